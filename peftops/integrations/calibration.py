"""A whole model becomes NF4 by calibration, block after block. The inputs of a block come from the blocks before it,
which are in 4 bits by then. Memory holds the 4-bit model, one dense block and the activations between two blocks."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..attaching import hosts
from ..attaching.config import check_choice, check_range
from ..attaching.targets import ALL_LINEAR, Target, blocks, body_of, find_targets
from ..methods.qlora import BLOCK_SIZES
from ..nn import NF4Linear, is_quantized, matrix, module_at, quantize_linears, shell_of, stacks_of
from ..nn.undo import about, all_or_nothing
from ..ops.gptq_nf4 import gptq_nf4
from ..ops.moments import Moments
from .calibrated_files import LAYOUTS, Unfinished
from .files import fingerprint
from .model_files import ModelFiles, replace

_FEW = 2000  # tokens


@dataclass(frozen=True)
class CalibrationConfig:
    """How :func:`quantize_model` works.

    Args:
        block_size, double_quant, damping: see :func:`peftops.gptq_quantize`.
        layout: of the files: "bitsandbytes", which transformers reads as well; or "peftops", the names of our own state
            dicts.
        batch: tokens that are computed at once.

    Examples:
        >>> peftops.CalibrationConfig(double_quant=False).layout
        'bitsandbytes'
    """

    block_size: int = 64
    double_quant: bool = True
    damping: float | None = None
    layout: Literal["bitsandbytes", "peftops"] = "bitsandbytes"
    batch: int = 4096

    def __post_init__(self) -> None:
        check_choice("block_size", self.block_size, BLOCK_SIZES)
        check_choice("layout", self.layout, LAYOUTS)
        check_range("batch", self.batch, 1, whole=True)
        if self.damping is not None and not 0 < self.damping < math.inf:
            raise ValueError(f"damping must be positive and finite, not {self.damping}")


@dataclass(frozen=True)
class LayerReport:
    """One layer: the number of calibration rows that it saw; the relative error of its outputs on them, in plain NF4
    and now; the best damping; and, if it is plain NF4, the reason."""

    name: str
    rows: int
    plain_error: float | None
    error: float | None
    damping: float | None = None
    why_plain: str | None = None


@dataclass
class CalibrationReport:
    """The results of :func:`quantize_model`."""

    tokens: int
    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def plain_error(self) -> float:
        """Of plain NF4, over all layers that saw rows (root mean square)."""
        return self._mean("plain_error")

    @property
    def error(self) -> float:
        """The same of what the model is now."""
        return self._mean("error")

    def _mean(self, name: str) -> float:
        squares = [getattr(layer, name) ** 2 for layer in self.layers if getattr(layer, name) is not None]
        return (sum(squares) / max(1, len(squares))) ** 0.5

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers in NF4, calibrated on {self.tokens:,} tokens in {self.seconds:.0f} s: "
            f"outputs err by {self.error:.2%}, plain NF4's by {self.plain_error:.2%}"
        ]
        plain = [layer for layer in self.layers if layer.why_plain]
        lines += [f"  plain NF4: {layer.name}, as {layer.why_plain}" for layer in plain[:8]]
        return "\n".join(lines + ([f"  and {len(plain) - 8} more"] if len(plain) > 8 else []))


@torch.no_grad()
def quantize_model(
    model: nn.Module | str | os.PathLike,
    rows: Sequence[Sequence[int] | Tensor],
    config: CalibrationConfig | None = None,
    *,
    out: str | os.PathLike | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    on_block: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[nn.Module, CalibrationReport]:
    """Put a language model's linear layers, except the output layer, into NF4 by :func:`peftops.gptq_quantize`.

    Args:
        model: the path of a dense model, with files as for :func:`peftops.load_model`, which are read block by block;
            or a dense model, which is changed in place.
        rows: token ids of calibration text, a sequence per row; a few thousand tokens in all, of the kind that the
            model will see, and not from a test set.
        out: a new directory for the result. If the process is killed, the same call goes on after the last finished
            block.
        tokenizer: is written to ``out``, too.
        dtype: as for :func:`peftops.load_model`, if ``model`` is a path.
        device: where to compute, and where the model is afterwards; by default where it is, or on the CPU.
        on_block: is called after each block with the number of finished blocks and of all blocks.

    Returns:
        The model, and a report of each layer. A layer that sees too few rows, such as an expert without tokens, becomes
        plain NF4, and the report says so.

    Raises:
        FileNotFoundError: there is no model at ``model``.
        ValueError: the rows are empty or hold a token that the model does not know; the model is quantised already, has
            adapters, or is not a stack of blocks that pass one tensor on; an unfinished result of other settings
            is there.
        OSError: ``out`` holds files already, or cannot be written.

    Examples:
        >>> model, report = peftops.quantize_model(llama(), [row for row in torch.randint(3, 64, (64, 32))])
        >>> report.error <= report.plain_error
        True
    """
    config, begin = config or CalibrationConfig(), time.perf_counter()
    files = (
        None if isinstance(model, nn.Module) else ModelFiles(model, dtype=dtype, trust_remote_code=trust_remote_code)
    )
    source, model = model, model if files is None else files.model
    _check_dense(source, model, files)
    stack, targets = blocks(model), find_targets(model, ALL_LINEAR)
    batches = _batches(rows, config.batch, model)
    report = CalibrationReport(sum(ids.numel() for ids in batches))
    if report.tokens < _FEW:
        warnings.warn(
            f"{report.tokens} tokens are few to calibrate with; {_FEW} are the least that one would take, "
            "and more are better",
            stacklevel=2,
        )
    device = torch.device(device) if device is not None else next(model.parameters()).device
    if device.type == "meta":
        device = torch.device("cpu")
    work = None
    if out is not None:
        named = fingerprint(Path(source)) if files else _numbers(model)
        work = Unfinished(Path(out), model, config, {"model": named, "rows": [ids.tolist() for ids in batches]})
    within = lambda name: any(name.startswith(f"{block}.") for block in stack)
    outside = {name for name in targets if not within(name)}
    with all_or_nothing(model) if files is None else contextlib.nullcontext():
        codes = {"block_size": config.block_size, "double_quant": config.double_quant}
        if files is None:
            quantize_linears(model, outside.__contains__, **codes)
        else:
            files.fill(outside.__contains__, wanted=lambda name: not within(name), **codes)
        report.layers += [LayerReport(name, 0, None, None, why_plain="it is in no block") for name in sorted(outside)]
        hidden, calls = _rehearse(model, stack, batches)
        move = lambda value: tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, value)
        hidden = move(hidden)
        for i, path in enumerate(stack):
            given, inside = move(calls.pop(path)), [name for name in targets if name.startswith(f"{path}.")]
            done = work.read(i, path, inside, LayerReport) if work else None
            if done is None:
                if files is not None:
                    files.fill(wanted=lambda name, path=path: name.startswith(f"{path}."))
                block = model.get_submodule(path).to(device)
                done = list(_calibrate(model, block, inside, hidden, given, config))
                if work:
                    work.write(i, path, done)
            block = model.get_submodule(path).to(device)
            hidden = [_run(block, x, call) for x, call in zip(hidden, given, strict=True)]
            report.layers += done
            on_block(i + 1, len(stack))
    model = model.requires_grad_(False).eval() if files is None else files.finish()
    model.to(device)
    report.seconds = time.perf_counter() - begin
    if work:
        work.finish(len(stack), report, tokenizer)
    return model, report


@torch.no_grad()
def input_moments(
    model: nn.Module, rows: Sequence[Sequence[int] | Tensor], *, target: Target = ALL_LINEAR, batch: int = 4096
) -> dict[str, Tensor]:
    """The mean of x x^T over what each linear layer of a causal language model is given: for
    ``LoftQConfig(moments=...)`` and ``LQLoRAConfig(moments=...)``.

    It keeps ``in * in`` numbers for each layer at the same time, so this is for models for which that fits into memory.

    Args:
        model: usually dense. It is run on the rows without a change.
        rows: token ids, as for :func:`quantize_model`.
        target: the layers, as for :class:`LoRAConfig`.
        batch: tokens that are computed at once.

    Returns:
        Float32 ``[in, in]`` by name of the layer, without layers that see no row.

    Examples:
        >>> moments = peftops.input_moments(llama(), ids)
        >>> moments["model.layers.0.mlp.up_proj"].shape
        torch.Size([32, 32])
    """
    names = find_targets(model, target)
    moments = {name: Moments(matrix(module_at(model, name)).shape[1], model.device, name) for name in names}
    was_training = model.training
    model.eval()
    try:
        with _watched(model, names, lambda name, x: moments[name].add(x), False):
            for ids in _batches(rows, batch, model):
                model.get_submodule(body_of(model))(input_ids=ids.to(model.device), use_cache=False)
    finally:
        model.train(was_training)
    return {name: of.mean() for name, of in moments.items() if of.count}


def _check_dense(source: Any, model: nn.Module, files: ModelFiles | None) -> None:
    experts = next((path for path, module in model.named_modules() if stacks_of(module)), None)
    if experts:
        raise ValueError(
            f"{source if files else type(model).__name__} is a mixture of experts, and {experts} would "
            "stay dense: calibration is for linear layers; load_model reads it into NF4"
        )
    if (files is not None and files.prequantized) or any(is_quantized(p) for p in model.parameters()):
        what = source if files else type(model).__name__
        raise ValueError(f"{what} is quantised already: the dense weights are gone")
    if any(True for _ in hosts(model)):
        raise ValueError(
            f"{type(model).__name__} has adapters; merge and detach them first: peftops.merge(model, "
            "dense=True), peftops.detach(model, merged=True)"
        )


def _batches(rows: Sequence[Sequence[int] | Tensor], size: int, model: nn.Module) -> list[Tensor]:
    """Batches ``[n, length]`` of rows of one length, with at most ``size`` tokens. There is no padding, because its
    activations would count."""
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        ids = torch.as_tensor(row, dtype=torch.long).flatten().cpu()
        by_length.setdefault(len(ids), []).append(ids)
    by_length.pop(0, None)
    if not by_length:
        raise ValueError("there are no calibration rows")
    known = len(model.get_input_embeddings().weight)
    wrong = [
        int(ids[(ids < 0) | (ids >= known)][0])
        for of in by_length.values()
        for ids in of
        if ids.min() < 0 or ids.max() >= known
    ]
    if wrong:
        raise ValueError(f"the calibration rows hold a token {wrong[0]}, and the model has those from 0 to {known - 1}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if max(by_length) > longest:
        raise ValueError(f"a calibration row has {max(by_length)} tokens, and the model {longest} positions")
    return [
        torch.stack(of[i : i + max(1, size // length)])
        for length, of in sorted(by_length.items())
        for i in range(0, len(of), max(1, size // length))
    ]


def _numbers(model: nn.Module) -> list[float]:
    """Numbers that distinguish a model in memory from another one."""
    return [p.double().sum().item() for p in model.parameters()]


Call = tuple[tuple, dict[str, Any]]  # the arguments of a block beside the hidden states


def _rehearse(model: nn.Module, stack: list[str], batches: list[Tensor]) -> tuple[list[Tensor], dict[str, list[Call]]]:
    """The first block's input for each batch, and the other arguments of each block. They are recorded in the model's
    own forward, with blocks that return their input."""
    hidden: list[Tensor] = []
    calls: dict[str, list[Call]] = {path: [] for path in stack}

    def stand_in(path: str) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if path == stack[0]:
                hidden.append(x)
            calls[path].append((args, kwargs))
            return x

        return forward

    own, body = [model.get_submodule(path) for path in stack], model.get_submodule(body_of(model))
    was_training = model.training
    model.eval()
    try:
        for path, block in zip(stack, own, strict=True):
            block.forward = stand_in(path)
        for ids in batches:
            body(input_ids=ids.to(next(body.get_input_embeddings().parameters()).device), use_cache=False)
    except (TypeError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{type(model).__name__} is not a stack of blocks that pass one tensor on: {error}") from error
    finally:
        for block in own:
            vars(block).pop("forward", None)
        model.train(was_training)
    if any(len(made) != len(batches) for made in calls.values()):
        raise ValueError(f"{type(model).__name__} does not call each of its blocks once: {', '.join(stack[:3])}, ...")
    return hidden, calls


def _run(block: nn.Module, x: Tensor, call: Call) -> Tensor:
    args, kwargs = call
    y = block(x, *args, **kwargs)
    return y[0] if isinstance(y, tuple) else y


def _calibrate(
    model: nn.Module,
    block: nn.Module,
    names: list[str],
    hidden: list[Tensor],
    calls: list[Call],
    config: CalibrationConfig,
) -> Iterator[LayerReport]:
    """Quantise the layers of a block, in the order of their calls: the inputs of later ones come from earlier ones."""
    for leader, once in _stages(model, block, names, hidden[0], calls[0]):
        moments: dict[str, Moments] = {}
        for name in dict.fromkeys(leader.values()):
            layer = model.get_submodule(name)
            moments[name] = Moments(matrix(layer).shape[1], layer.weight.device, name)
        for x, call in zip(hidden, calls, strict=True):
            with _watched(model, list(moments), lambda name, x, moments=moments: moments[name].add(x), once):
                _run(block, x, call)
        damping = dict.fromkeys(moments, config.damping)
        for name in leader:
            layer, source = model.get_submodule(name), leader[name]
            seen = moments[source]
            with about(name):
                found = gptq_nf4(
                    matrix(layer).contiguous(),
                    seen,
                    block_size=config.block_size,
                    double_quant=config.double_quant,
                    damping=damping[source],
                )
            damping[source] = found.damping  # it is the inputs that it is about, more than the weight
            replace(model, name, NF4Linear(found.weight, None, shell_of(layer)))
            number = lambda error: error if math.isfinite(error) else None
            yield LayerReport(
                name, seen.count, number(found.plain_error), number(found.error), found.damping, found.why_plain
            )


class _Enough(Exception):
    """Raised to end a forward pass when all inputs have been taken."""


@contextlib.contextmanager
def _watched(model: nn.Module, names: list[str], take: Callable[[str, Tensor], None], stop: bool) -> Iterator[None]:
    """Inside, the inputs of these layers are taken. With ``stop``, a forward pass ends as soon as each layer had
    one."""
    left = set(names)

    def hook(name: str) -> Callable:
        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            take(name, args[0] if args else kwargs["input"])
            left.discard(name)
            if stop and not left:
                raise _Enough

        return before

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    try:
        with contextlib.suppress(_Enough):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _stages(
    model: nn.Module, block: nn.Module, names: list[str], x: Tensor, call: Call
) -> list[tuple[dict[str, str], bool]]:
    """The layers in the order of their calls, in groups that read one tensor, or are the same layers of several
    experts. For each layer: the layer whose input it shares. Also whether each is called exactly once in a forward
    pass. A layer that this batch does not reach joins the group of the same layer of other experts, or the last
    group."""
    inputs: dict[str, Tensor] = {}  # (kept, so that no two tensors have one identity)
    calls: dict[str, int] = {}

    def take(name: str, x: Tensor) -> None:
        inputs.setdefault(name, x)
        calls[name] = calls.get(name, 0) + 1

    with _watched(model, names, take, False):
        _run(block, x, call)
    stages: list[dict[str, str]] = []
    alike = lambda name: re.sub(r"\.\d+\.", ".*.", name.removeprefix(names[0].rpartition(".")[0]))
    for name in [*inputs, *(name for name in names if name not in inputs)]:
        same = [
            (i, other)
            for i, stage in enumerate(stages)
            for other in stage
            if name in inputs and inputs.get(other) is inputs[name]
        ]
        kind = [i for i, stage in enumerate(stages) if any(alike(other) == alike(name) for other in stage)]
        if same:
            i, other = same[0]
            stages[i][name] = stages[i][other]
        elif kind or (name not in inputs and stages):
            stages[kind[0] if kind else -1][name] = name
        else:
            stages.append({name: name})
    return [(stage, all(calls.get(name) == 1 for name in stage)) for stage in stages]
