"""Models, tokenizers and answers for the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attaching.config import Config
from ..integrations import load
from ..integrations.hf import check_own_code, gguf_file, load_model, model_config
from ..integrations.peft_files import read_adapter
from ..methods.qlora import QLoRAConfig
from ..prompts.chat import prompt_ids, stop_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options about the model, which every command has."""
    arg = parser.add_argument
    arg("--model", type=Path, required=True, help="directory with config.json and safetensors, or a GGUF file")
    arg("--dtype", choices=["auto", *DTYPES], default="auto")
    arg(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code in the model's directory; use it only for code that you have read",
    )


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    """The same with an adapter. Its files tell the base on which it was trained."""
    add_arguments(parser)
    parser.add_argument("--adapter", type=Path, help="directory with an adapter")
    add_base_arguments(parser)


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """By default the model has the format of its files, or the format in which the adapter was trained."""
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--dense", action="store_true", help="leave the model dense, even if QLoRA trained it in 4 bits")
    base.add_argument(
        "--quantize",
        action="store_true",
        help="read the model in 4 bits, even if the adapter was trained on dense weights",
    )


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    if not path.exists():  # transformers would look for a name of the Hub
        raise FileNotFoundError(f"no model at {path}")
    file = gguf_file(path)
    where, how = (path, {}) if file is None else (file.parent, {"gguf_file": file.name})
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **how)
    except Exception as error:  # any error that a reader raises for a damaged file
        check_own_code(path, error)
        raise ValueError(f"the tokenizer of {path} cannot be read: {' '.join(str(error).split())}") from error


def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype: bfloat16 on a GPU; float32 on a CPU, because the layers of the model that are not ours are
    fastest in it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, DTYPES[dtype]


def load_base(args: argparse.Namespace, *, quantize: bool, **options: Any) -> nn.Module:
    device, dtype = device_and_dtype(args.dtype)
    model_config(args.model, trust_remote_code=args.trust_remote_code)  # raises if it is not a causal language model
    return load_model(
        args.model, dtype=dtype, quantize=quantize, trust_remote_code=args.trust_remote_code, **options
    ).to(device)


def base_options(config: Config) -> dict[str, Any]:
    """How to read the model for an adapter: dense for most methods, which then change it themselves; for QLoRA directly
    in NF4 with the adapter's block size, so that the dense model never exists."""
    if type(config) is QLoRAConfig and config.format == "nf4":
        return {"quantize": True, "block_size": config.block_size, "double_quant": config.double_quant}
    return {"quantize": False}


def load_adapted(args: argparse.Namespace) -> nn.Module:
    """The model with the adapter, on the base that it was trained on or that the options ask for."""
    config, _ = read_adapter(args.adapter)
    if not args.dense and not args.quantize:
        return load(load_base(args, **base_options(config)), args.adapter)
    model = load_base(args, quantize=args.quantize)
    # LoRA's factors have the same meaning on any base, so QLoRA's may be put on a dense one. Factors of methods that
    # choose codes themselves fit only these codes.
    return load(model, args.adapter, quantize=False if type(config) is QLoRAConfig else None)


def vocabulary(model: nn.Module) -> int:
    """The number of tokens for which the model has embeddings."""
    return len(model.get_input_embeddings().weight)


def pad_id(tokenizer: Any, model: nn.Module) -> int:
    """An id for padding. Padding is masked, so it may be any id of the model."""
    known = (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < vocabulary(model))
    return next(known, 0)


def positions(model: nn.Module) -> float:
    """How many tokens the model can read."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Any, messages: list[dict[str, str]], max_tokens: int) -> str:
    """The model's greedy answer, at most as long as the model has positions.

    Raises:
        ValueError: the prompt alone has more tokens than that.
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt_ids(tokenizer, messages)], device=model.device)
    if ids.numel() == 0 or int(ids.max()) >= vocabulary(model):
        raise ValueError(
            f"the tokenizer makes {ids[0].tolist()[:9]} of the prompt, and the model knows the tokens "
            f"from 0 to {vocabulary(model) - 1}"
        )
    room = positions(model) - ids.shape[1]
    if room < 1:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens leaves no room for an answer in the model's "
            f"{positions(model)} positions"
        )
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=int(min(max_tokens, room)),
        do_sample=False,
        pad_token_id=pad_id(tokenizer, model),
        eos_token_id=stop_ids(tokenizer, model.generation_config) or None,
    )
    model.train(was_training)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
