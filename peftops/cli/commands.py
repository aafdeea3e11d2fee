"""``peftops generate`` and ``peftops merge``."""

from __future__ import annotations

import argparse

from ..integrations.files import check_new_directory
from ..methods import detach
from ..methods import merge as merge_adapter
from .export import write_dense
from .model import answer, load_adapted, load_base, load_tokenizer


def generate(args: argparse.Namespace) -> int:
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    model = load_adapted(args) if args.adapter else load_base(args, quantize=args.quantize)
    for prompt in args.prompt:
        print(answer(model, tokenizer, [{"role": "user", "content": prompt}], args.max_tokens), flush=True)
    return 0


def merge(args: argparse.Namespace) -> int:
    """Into dense weights: those that the adapter was trained on, so that the merged model is what was trained."""
    if not args.adapter:
        raise ValueError("merge needs --adapter")
    folder = check_new_directory(args.out)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    model = load_adapted(args)
    print(merge_adapter(model, dense=True))
    detach(model, merged=True)
    write_dense(model, tokenizer, folder)
    print(f"merged model is in {folder}")
    return 0
