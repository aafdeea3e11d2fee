"""The files of a calibration: one for each finished block, and a checkpoint of all in the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..attaching.targets import layers
from ..nn import NF4Linear, base_of, is_conv1d, shell_of, sizes
from ..ops import NF4Tensor
from .bitsandbytes_files import to_bitsandbytes
from .code_files import Layout
from .files import check_new_directory, durable, whole_directory, writable_directory, write_atomically
from .model_files import replace

LAYOUTS = ("bitsandbytes", "peftops")
REPORT, _SETTINGS = "calibration.json", "settings.json"


class Unfinished:
    """A directory beside ``out`` that is renamed to ``out`` when it is complete.

    Args:
        settings: the settings, beside ``config``, that must be the same for a run to go on.

    Raises:
        OSError: ``out`` holds files already.
        ValueError: an unfinished run of other settings is there; or the layout cannot hold the model.
    """

    def __init__(self, out: Path, model: nn.Module, config: Any, settings: dict[str, Any]):
        self.out, self.model, self.config = check_new_directory(out), model, config
        if config.layout == "bitsandbytes" and any(is_conv1d(m) for m in model.modules()):
            raise ValueError(
                f"bitsandbytes' layout has no Conv1D, which {type(model).__name__} is made of; use layout='peftops'"
            )
        self.folder = writable_directory(self.out.parent / f".{self.out.name}.unfinished")
        digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
        own = dataclasses.asdict(config) | {name: digest(value) for name, value in settings.items()}
        file = self.folder / _SETTINGS
        if file.exists():
            try:
                was = json.loads(file.read_text())
            except (ValueError, RecursionError):
                was = None
            different = [name for name in own if not isinstance(was, dict) or was.get(name) != own[name]]
            if different:
                raise ValueError(
                    f"{self.folder} is of an unfinished run with another {', '.join(different)}; delete "
                    "it to begin anew, or give another directory"
                )
        write_atomically(file, lambda path: path.write_text(json.dumps(own, indent=2)))

    def _block(self, i: int) -> Path:
        return self.folder / f"block-{i:05d}.safetensors"

    def write(self, i: int, path: str, reports: list[Any]) -> None:
        """A block that is done."""
        tensors = self._tensors(self.model.get_submodule(path), f"{path}.")
        told = {"format": "pt", "reports": json.dumps([dataclasses.asdict(report) for report in reports])}
        write_atomically(self._block(i), lambda file: save_file(tensors, file, told))

    def read(self, i: int, path: str, layers: list[str], kind: type) -> list[Any] | None:
        """Put a block that an earlier run finished into the model, and return the report of its ``layers``; None if no
        run finished it.

        Raises:
            ValueError: the file is damaged, or of another block; nothing has changed then.
        """
        file = self._block(i)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
                reports = [kind(**report) for report in json.loads(opened.metadata()["reports"])]
            if sorted(report.name for report in reports) != sorted(layers):
                raise ValueError("it is a report of other layers")
            codes = {name: self._codes(name, tensors) for name in layers}
            self._check_rest(path, {f"{name}.weight" for name in layers}, tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it to have that block done again") from None
        for name, weight in codes.items():
            replace(self.model, name, NF4Linear(weight, None, shell_of(self.model.get_submodule(name))))
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor
        return reports

    def _codes(self, name: str, tensors: dict[str, Tensor]) -> NF4Tensor:
        """A layer's weight from a block's tensors; its parts are removed from them."""
        of, layer = f"{name}.weight", self.model.get_submodule(name)
        own = {key[len(name) + 1 :]: tensors.pop(key) for key in list(tensors) if key == of or key.startswith(f"{of}.")}
        return Layout(self.config.layout).read(own, torch.Size(sizes(layer)[::-1]), layer.weight.dtype)

    def _check_rest(self, path: str, coded: set[str], tensors: dict[str, Tensor]) -> None:
        """Raise unless the other tensors, those that are not in codes, are exactly the block's."""
        block = self.model.get_submodule(path)
        own = dict(block.named_parameters(prefix=path)) | {
            f"{at}.{name}": buffer
            for at, module in block.named_modules(prefix=path)
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }
        told = lambda found: {key: (t.shape, t.dtype) for key, t in found.items() if key not in coded}
        own, given = told(own), told(tensors)
        for name in sorted(own.keys() | given.keys()):
            if own.get(name) != given.get(name):
                raise ValueError(f"{name} is not the same as in the model")

    def finish(self, count: int, report: Any, tokenizer: Any) -> None:
        """Give all files their final names."""
        blocks, held = [self._block(i) for i in range(count)], {}
        for file in blocks:
            with safe_open(file, "pt") as opened:
                held |= dict.fromkeys(opened.keys(), file)
        rest = {name: t for name, t in self._tensors(self.model, "").items() if name not in held}
        last = self.folder / "rest.safetensors"
        write_atomically(last, lambda file: save_file(rest, file, {"format": "pt"}))
        held |= dict.fromkeys(rest, last)
        names = [f"model-{i + 1:05d}-of-{count + 1:05d}.safetensors" for i in range(count + 1)]
        renamed = dict(zip([*blocks, last], names, strict=True))
        total = sum(file.stat().st_size for file in renamed)
        index = {"metadata": {"total_size": total}, "weight_map": {name: renamed[held[name]] for name in sorted(held)}}
        for file, name in renamed.items():
            os.replace(file, self.folder / name)
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        (self.folder / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        _write_configuration(self.model, self.folder, self.config.layout, tokenizer)
        (self.folder / _SETTINGS).unlink()
        durable(self.folder)
        if self.out.exists():
            self.out.rmdir()
        os.replace(self.folder, self.out)

    def _tensors(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        return tensors_of(module, self.config.layout, prefix)


def write_nf4(model: nn.Module, folder: Path, tokenizer: Any, layout: str = "bitsandbytes") -> None:
    """A model's own tensors, some of them in NF4, as a directory; adapters that it has are left out."""
    tensors = tensors_of(model, layout)
    with whole_directory(folder, sum(t.nbytes for t in tensors.values())) as temporary:
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        _write_configuration(model, temporary, layout, tokenizer)


def tensors_of(module: nn.Module, layout: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a module for files in this layout, by the names without adapters; one of those that are tied."""
    tensors, seen = {}, set()
    for path, layer in layers(module):
        layer, path = base_of(layer), f"{prefix}{path}." if path else prefix
        own = {name: p for name, p in layer._parameters.items() if p is not None and id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        if isinstance(layer, NF4Linear) and "weight" in own:
            weight = own.pop("weight")
            own |= to_bitsandbytes(weight) if layout == "bitsandbytes" else _own(weight)
        kept = {name: b for name, b in layer._buffers.items() if name not in layer._non_persistent_buffers_set}
        own |= {name: b for name, b in kept.items() if b is not None}
        tensors |= {f"{path}{name}": tensor.detach().cpu().contiguous() for name, tensor in own.items()}
    return tensors


def _own(weight: NF4Tensor) -> dict[str, Tensor]:
    return {f"weight.{part}": tensor for part, tensor in weight.parts().items()}


def _write_configuration(model: nn.Module, folder: Path, layout: str, tokenizer: Any) -> None:
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    coded = [base_of(layer).weight for _, layer in layers(model) if isinstance(base_of(layer), NF4Linear)]
    if layout == "peftops":
        from .quantizer import NF4Config

        how = NF4Config(coded[0].block_size, coded[0].double_quant).to_dict()
    else:
        dense = [name for name, layer in layers(model) if type(base_of(layer)) is nn.Linear]
        how = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": coded[0].double_quant,
            "bnb_4bit_compute_dtype": str(coded[0].dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense,
        }
    model.config.architectures = [type(model).__name__]
    config = model.config.to_dict() | {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
