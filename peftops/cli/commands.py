"""``peftops generate`` and ``peftops merge``."""

from __future__ import annotations

import argparse

from ..attaching import detach
from ..attaching import merge as merge_adapter
from ..integrations.calibration import CalibrationConfig
from ..integrations.files import check_new_directory
from ..integrations.gguf_model import check_gguf
from ..integrations.hf import model_config
from ..integrations.peft_files import read_adapter
from ..methods.qalora import QALoRAConfig
from .data import encode, read_rows
from .export import stand_alone, write_dense, write_packed, write_whole_gguf
from .model import answer, load_adapted, load_base, load_tokenizer
from .quantize import calibrated, some_rows


def generate(args: argparse.Namespace) -> int:
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    model = load_adapted(args) if args.adapter else load_base(args, quantize=args.quantize)
    for prompt in args.prompt:
        print(answer(model, tokenizer, [{"role": "user", "content": prompt}], args.max_tokens), flush=True)
    return 0


def merge(args: argparse.Namespace) -> int:
    """Merge into the weights on which the adapter was trained, so that the merged model is the trained one: into dense
    weights, or, with QA-LoRA, into the codes themselves."""
    if not args.adapter:
        raise ValueError("merge needs --adapter")
    if args.packed and not isinstance(config := read_adapter(args.adapter)[0], QALoRAConfig):
        kind = type(config).__name__.removesuffix("Config")
        raise ValueError(f"--packed is for QA-LoRA, which merges into codes; {args.adapter} is of {kind}")
    if args.packed and args.calibrate:
        raise ValueError("--packed keeps QA-LoRA's codes, and --calibrate makes NF4 of dense weights; give one of them")
    if args.gguf_pre and args.to != "gguf":
        raise ValueError("--gguf-pre is about the tokenizer in a GGUF; it needs --to gguf")
    if args.to == "gguf" and (args.packed or args.calibrate):
        raise ValueError("--to gguf writes dense weights; --packed and --calibrate write codes")
    folder = check_new_directory(args.out)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    if args.to == "gguf":  # (merging takes long, so a file that cannot be written is an error before it)
        check_gguf(model_config(args.model, trust_remote_code=args.trust_remote_code), tokenizer, args.gguf_pre)
    rows = some_rows(encode(read_rows(args.calibrate), tokenizer, 512)) if args.calibrate else []
    model = load_adapted(args)
    print(merge_adapter(model, dense=not args.packed))
    detach(model, merged=True)
    if args.calibrate:
        stand_alone(model)
        calibrated(model, rows, CalibrationConfig(), folder, tokenizer)
    elif args.to == "gguf":
        write_whole_gguf(model, tokenizer, folder, args.gguf_pre)
    else:
        (write_packed if args.packed else write_dense)(model, tokenizer, folder)
    print(f"merged model is in {folder}")
    return 0
