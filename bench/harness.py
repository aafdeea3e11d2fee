"""Times the entries of bench_*.py and prints one line per case.

All providers of a case run in one process, interleaved, and the median counts: a slow minute of a shared
machine hits all of them alike. Read ratios, not single times.

With ``--device cuda`` the same cases are made on the GPU, peers included, and timed by its own events, each call after
a write that leaves nothing of the one before in its L2 cache.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import peftops
from peftops import _C


@dataclass
class Case:
    """What to time: ``providers`` maps a name to a callable; the first is ours, the others are peers."""

    label: str
    providers: dict[str, Callable[[], object]]
    flops: float = 0.0  # operations that any provider has to do, two per multiply-add
    bytes: float = 0.0  # bytes that ours has to move, at least
    want: dict[str, float] = field(default_factory=dict)  # how many times faster than each peer it should be on a CPU
    dtype: torch.dtype = torch.float32  # of the activations: which peak of a GPU the operations are a share of
    exact: Callable[[], torch.Tensor] | None = None  # in float64: then each provider's error stands beside its time


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call, of several in a row."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


FLUSH = 256 << 20  # bytes: more than the L2 cache of any GPU, and long enough a write to hide a launch


def cuda_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median seconds per call, from an event before it to one after it on the GPU."""
    memory = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        memory.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def measure(
    providers: dict[str, Callable[[], object]], rounds: int = 7, seconds: float = 0.05, device: str | None = None
) -> dict[str, float]:
    """Median seconds per call of each provider; on the default device if none is named."""
    of = {"cpu": cpu_seconds, "cuda": cuda_seconds}[device or torch.get_default_device().type]
    repeats = {}
    for name, call in providers.items():
        call()
        repeats[name] = max(1, int(seconds / max(of(call, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            times[name].append(of(call, repeats[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def errors(case: Case) -> dict[str, float]:
    """How far what each provider returns is from the exact result, relative to that (Euclidean norms)."""
    if case.exact is None:
        return {}
    exact = case.exact()
    return {name: ((call().double() - exact).norm() / exact.norm()).item() for name, call in case.providers.items()}


def on_device(cases: Iterable[Case], device: str) -> Iterator[Case]:
    """Each case made with this device as torch's default one, which it is no longer while the case is timed."""
    cases = iter(cases)
    while True:
        with torch.device(device):
            case = next(cases, None)
        if case is None:
            return
        yield case


@functools.cache
def multiply_add_peak(threads: int) -> float:
    """fp32 operations a second of this many threads, measured; 0 without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.cpp")
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        peak = ctypes.CDLL(str(library)).peak
        peak.restype = ctypes.c_double
        return max(peak(threads) for _ in range(3))


@functools.cache
def matmul_peak(dtype: torch.dtype, device: str, size: int = 8192) -> float:
    """Operations a second of a large matmul: what the library makes of tensor cores, or in float32 of the rest."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / measure({"matmul": lambda: a @ b}, device=device)["matmul"]


@functools.cache
def copy_bandwidth(threads: int, device: str = "cpu") -> float:
    """Bytes a second of a large copy, reads and writes counted."""
    source = torch.zeros(64 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure({"copy": lambda: target.copy_(source)}, 9, device=device)["copy"]


def cpu_peaks(args: argparse.Namespace) -> tuple[str, Callable[[torch.dtype], float], float]:
    """The machine in words; operations a second by dtype; bytes a second."""
    torch.set_num_threads(args.threads)
    if args.isa:
        _C.set_isa_limit(args.isa)
    peak, bandwidth = multiply_add_peak(args.threads), copy_bandwidth(args.threads)
    words = f"{args.threads} threads, {_C.isa()}, torch {torch.__version__}; {peak / 1e9:.0f} GFLOP/s fp32"
    return f"{words}, {bandwidth / 1e9:.1f} GB/s copy", lambda dtype: peak, bandwidth


def cuda_peaks(args: argparse.Namespace) -> tuple[str, Callable[[torch.dtype], float], float]:
    if not torch.cuda.is_available() or not hasattr(peftops, "_C_cuda"):
        raise SystemExit(
            "--device cuda needs a GPU, torch with CUDA, and peftops built with it: python -m peftops info"
        )
    peak, bandwidth = functools.partial(matmul_peak, device="cuda"), copy_bandwidth(0, "cuda")
    words = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}; "
    words += ", ".join(f"{peak(kind) / 1e12:.0f} TFLOP/s {str(kind)[6:]}" for kind in (torch.bfloat16, torch.float32))
    return f"{words}, {bandwidth / 1e9:.0f} GB/s copy", peak, bandwidth


def run(title: str, cases: Iterable[Case], arguments: argparse.ArgumentParser | None = None) -> None:
    """Time the cases and print a table: time of each provider and its error, if known; ratios; share of what the
    machine can do."""
    args = (arguments or parser()).parse_args()
    words, peak_of, bandwidth = {"cpu": cpu_peaks, "cuda": cuda_peaks}[args.device](args)
    print(f"{title}: {words}")
    for case in on_device(cases, args.device):
        if args.only and args.only not in case.label:
            continue
        times = measure(case.providers, args.rounds, device=args.device)
        ours, *peers = times
        off = errors(case)
        error = lambda name, off=off: f" ({off[name]:.1e})" if off else ""
        text = f"{case.label:44} {ours} {_time(times[ours])}{error(ours)}"
        missed = False
        for peer in peers:
            ratio, want = times[peer] / times[ours], case.want.get(peer) if args.device == "cpu" else None
            short = want is not None and ratio < want
            missed |= short
            text += f" | {peer} {_time(times[peer])}{error(peer)} {ratio:6.2f}x"
            text += f" (want {want:g}x)" if short else ""
        if case.flops and (peak := peak_of(case.dtype)):
            text += f" | {100 * case.flops / times[ours] / peak:3.0f}% of peak"
        if case.bytes:
            text += f" | {100 * case.bytes / times[ours] / bandwidth:3.0f}% of copy"
        print(text, flush=True)
        if args.json:
            record = {"title": title, "label": case.label, "seconds": times, "errors": off, "want": case.want}
            with open(args.json, "a") as file:
                print(json.dumps(record), file=file)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:9.1f} us" if seconds < 0.01 else f"{seconds * 1e3:9.2f} ms"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser()
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the cases are made and timed")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--isa", choices=_C.isas(), help="use no higher instruction set")
    result.add_argument("--only", help="cases whose label contains this")
    result.add_argument("--rounds", type=int, default=7)
    result.add_argument("--json", help="append a record per case to this file")
    return result
