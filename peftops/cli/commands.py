"""``peftops generate`` and ``peftops merge``."""

from __future__ import annotations

import argparse

from ..integrations import load
from ..integrations.files import writable_directory
from ..methods import detach
from ..methods import merge as merge_adapter
from .model import answer, load_base, load_tokenizer


def generate(args: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(args.model)
    model = load_base(args.model, args.dtype, quantize=not args.dense)
    if args.adapter:
        load(model, args.adapter, quantize=False)
    for prompt in args.prompt:
        print(answer(model, tokenizer, [{"role": "user", "content": prompt}], args.max_tokens), flush=True)
    return 0


def merge(args: argparse.Namespace) -> int:
    """Into the dense weights of the model, not those that QLoRA rounded: nothing is rounded twice."""
    if not args.adapter:
        raise ValueError("merge needs --adapter")
    folder = writable_directory(args.out)
    tokenizer = load_tokenizer(args.model)
    model = load_base(args.model, args.dtype, quantize=False)
    load(model, args.adapter, quantize=False)
    print(merge_adapter(model))
    detach(model, merged=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"merged model is in {folder}")
    return 0
