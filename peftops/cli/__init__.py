"""The command line: ``peftops finetune``, ``quantize``, ``generate``, ``serve``, ``merge``, ``influence``, ``plan``,
``report``, ``info``."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import traceback
from pathlib import Path

from .. import _C, __version__

_EXPECTED = (ValueError, TypeError, OSError, ImportError)  # whose sentences say all
_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 16  # glibc's name, and bytes
_MOST = 1000  # characters of a sentence


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Any error is one sentence on stderr, with status 2."""
    parser = argparse.ArgumentParser(prog="peftops", description="Parameter-efficient fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=f"peftops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        arguments(command)
        command.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    args = parser.parse_args(argv)
    missing = [name for name in ("transformers", "tqdm", "matplotlib", "accelerate") if not _installed(name)]
    if missing and args.command != "info":
        print(f"peftops: {args.command} needs {', '.join(missing)}: pip install 'peftops[cli]'", file=sys.stderr)
        return 2
    give_blocks_back()
    try:
        return _run(args)
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        print(f"peftops: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\npeftops: interrupted", file=sys.stderr)
        return 130


def give_blocks_back() -> None:
    """Let glibc return every large block to the system as it is freed.

    By default glibc raises the size from which it returns blocks, up to 32 MiB, and then keeps the memory that training
    frees: a third of the peak is unused. docs/memory.md has the cost in time. If MALLOC_MMAP_THRESHOLD_ is set, nothing
    changes.
    """
    if sys.platform.startswith("linux") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _sentence(error: Exception) -> str:
    words = " ".join(str(error).split())
    text = words if len(words) <= _MOST else f"{words[:_MOST]} ..."
    if isinstance(error, _EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text} (--traceback shows where)" if text else type(error).__name__


def _run(args: argparse.Namespace) -> int:
    # Each command imports what it needs when it runs: `peftops info` must not wait for transformers.
    if args.command == "info":
        return info()
    if args.command == "report":
        from . import report

        print(report.table([report.read(folder) for folder in args.runs]))
        return 0
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.command == "finetune":
        from .finetune import run
    elif args.command == "generate":
        from .commands import generate as run
    elif args.command == "influence":
        from .influence import run
    elif args.command == "plan":
        from .plan import run
    elif args.command == "quantize":
        from .quantize import run
    elif args.command == "serve":
        from .serve import run
    else:
        from .commands import merge as run
    return run(args)


def info() -> int:
    """The build, and the machine that it runs on."""
    import torch

    build = _C.build_info
    how = f"{build['compiler']} ({build['build_type']}), torch {build['torch_built_with']}"
    print(f"peftops {__version__}, built with {how}")
    print(f"torch   {torch.__version__}, {torch.get_num_threads()} threads")
    limit = "" if _C.isa() == _C.best_isa() else f" (of {_C.best_isa()}; limited by PEFTOPS_ISA)"
    print(f"CPU     kernels for {_C.isa()}{limit}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    print(f"CUDA    {'kernels for CUDA ' + build['cuda'] if build['cuda'] else 'no kernels in this build'}, {device}")
    return 0


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _finetune_arguments(parser: argparse.ArgumentParser) -> None:
    from .finetune import add_arguments

    add_arguments(parser)


def _adapted_arguments(parser: argparse.ArgumentParser) -> None:
    from .model import add_adapter_arguments

    add_adapter_arguments(parser)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _adapted_arguments(parser)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("prompt", nargs="+", help="the question; several are answered one after the other")


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    _adapted_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="new directory for the merged model")
    parser.add_argument(
        "--to", choices=["safetensors", "gguf"], default="safetensors", help="gguf: one file, for llama.cpp and Ollama"
    )
    parser.add_argument(
        "--gguf-pre",
        metavar="NAME",
        help="llama.cpp's name for how the tokenizer cuts text (llama-bpe, qwen2), if the tokenizer does not tell it",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="for QA-LoRA: keep the codes, in GPTQ's layout with "
        "float32 zeros (read by peftops; GPTQ's own kernels need whole zeros)",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="data file for calibration, not of a test set: put the merged model into NF4, in bitsandbytes' layout",
    )


def _influence_arguments(parser: argparse.ArgumentParser) -> None:
    from .influence import add_arguments

    _adapted_arguments(parser)
    add_arguments(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from .plan import add_arguments

    add_arguments(parser)


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    from .quantize import add_arguments

    add_arguments(parser)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    from .serve import add_arguments

    add_arguments(parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="output directories of peftops finetune")


_COMMANDS = {
    "finetune": ("Train an adapter of a causal language model.", _finetune_arguments),
    "quantize": ("Put a model into NF4 with calibration: half of what that costs is gone.", _quantize_arguments),
    "generate": ("Let a model answer, with an adapter or without.", _generate_arguments),
    "serve": ("Answer requests over HTTP or of a file, each with its own adapter, in one batch.", _serve_arguments),
    "merge": ("Fold an adapter into a dense model and save that.", _merge_arguments),
    "influence": ("Tell which training rows made a model say something.", _influence_arguments),
    "plan": ("Tell which methods fit in memory, and which one to choose.", _plan_arguments),
    "report": ("Print runs of finetune side by side.", _report_arguments),
    "info": ("Tell what was built and what it runs on.", lambda parser: None),
}
