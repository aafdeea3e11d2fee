"""Sound files of each kind, small: what the fuzzer damages."""

from __future__ import annotations

import atexit
import copy
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

import models
import peftops


@functools.cache
def _base() -> nn.Module:
    return models.llama(tied=False)


def base() -> nn.Module:
    torch.manual_seed(0)
    return copy.deepcopy(_base())


@functools.cache
def seeds(kind: str) -> Path:
    """Sound files of a kind, small."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    MAKE[kind](folder / kind)
    return folder / kind


def _config(folder: Path) -> None:
    base().save_pretrained(folder)


def _adapter(folder: Path) -> None:
    for name, config in {
        "lora": peftops.LoRAConfig(r=4, rank_pattern={"q_proj": 2}),
        "qlora": peftops.QLoRAConfig(r=4),
        "dora": peftops.DoRAConfig(r=4),
        "ia3": peftops.IA3Config(),
        "loftq": peftops.LoftQConfig(r=4, iterations=1),
        "prefix": peftops.PrefixTuningConfig(tokens=3),
        "qalora": peftops.QALoRAConfig(r=4),
        "whole": peftops.LoRAConfig(r=4, target=["q_proj"], modules_to_save=["lm_head"]),
    }.items():
        peftops.save(peftops.attach(base(), config), folder / name)


def _report(folder: Path) -> None:
    made = {"method": "lora", "losses": [1.0], "evaluations": [[0, 2.0]], "loss_before": 2.0, "loss_after": 1.5}
    counts = "trainable total frozen_bytes dense_bytes peak_bytes steps rows_per_step seconds tokens".split()
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({**made, **dict.fromkeys(counts, 3)}))


def _bitsandbytes(folder: Path) -> None:
    from safetensors.torch import save_file

    from peftops.integrations.bitsandbytes_files import to_bitsandbytes

    model = peftops.detach(peftops.attach(base(), peftops.QLoRAConfig()))
    tensors = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, peftops.NF4Tensor):
            layer = name.removesuffix("weight")
            tensors |= {layer + part: t.clone() for part, t in to_bitsandbytes(parameter.data).items()}
        else:
            tensors[name] = parameter.detach().clone()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))


def _gguf(path: Path) -> None:
    import gguf

    config = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, tie_word_embeddings=False))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _codes(folder: Path) -> None:
    """Models in codes, in every layout that is read, and tensors of GPTQ under the name of AWQ, which are refused."""
    from moe_models import moe

    for name, config, model in [
        ("nf4", peftops.NF4Config(), base()),
        ("nf4-plain", peftops.NF4Config(double_quant=False), base()),
        ("group", peftops.GroupConfig(bits=3), base()),
        ("gptq", peftops.GroupConfig(layout="gptq"), base()),
        ("mxfp4", peftops.MXFP4Config(), base()),
        ("gpt-oss", peftops.MXFP4Config(["q_proj", "k_proj", "v_proj", "o_proj"], "mxfp4"), moe("GptOss")),
        ("experts", peftops.NF4Config(), moe("Qwen3Moe")),
    ]:
        model.save_pretrained(folder / "dense" / name)
        made = type(model).from_pretrained(folder / "dense" / name, quantization_config=config)
        made.save_pretrained(folder / name)
    shutil.rmtree(folder / "dense")
    shutil.copytree(folder / "gptq", folder / "awq")
    file = folder / "awq" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    file.write_text(json.dumps(config))


def _trainer(folder: Path) -> None:
    """What transformers' Trainer leaves of adapters; of some methods with the numbers that train beside them."""
    from peftops.integrations.checkpoints import save_training

    for name, config in CHECKPOINTS.items():
        model = peftops.attach(base(), config)
        model.save_pretrained(folder / name)
        save_training(model, folder / name)


def _calibration(folder: Path) -> None:
    """A calibration that was interrupted after its first block, and the model that it is of."""

    def interrupt(done: int, of: int) -> None:
        if done:
            raise KeyboardInterrupt

    base().save_pretrained(folder / "model")
    try:
        peftops.quantize_model(folder / "model", calibration_rows(), out=folder / "out", on_block=interrupt)
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


def calibration_rows() -> list[torch.Tensor]:
    return [models.tokens(1, 24, seed=seed)[0] for seed in range(6)]


CHECKPOINTS = {
    "lora": peftops.LoRAConfig(r=4, target=["q_proj", "v_proj"]),
    "pissa": peftops.PiSSAConfig(r=4, target=["q_proj"]),
    "prefix": peftops.PrefixTuningConfig(tokens=3),
    "whole": peftops.LoRAConfig(r=4, target=["q_proj"], modules_to_save=["lm_head"]),
}
MAKE = {
    "adapter": _adapter,
    "config": _config,
    "bitsandbytes": _bitsandbytes,
    "gguf": _gguf,
    "report": _report,
    "codes": _codes,
    "trainer": _trainer,
    "calibration": _calibration,
}
