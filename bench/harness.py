"""Times the entries of bench_*.py and prints one line per case.

All providers of a case run in one process, interleaved, and the median counts: a slow minute of a shared
machine hits all of them alike. Read ratios, not single times.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftops import _C


@dataclass
class Case:
    """What to time: ``providers`` maps a name to a callable; the first is ours, the others are peers."""

    label: str
    providers: dict[str, Callable[[], object]]
    flops: float = 0.0  # operations that any provider has to do, two per multiply-add
    bytes: float = 0.0  # bytes that ours has to move, at least
    want: dict[str, float] = field(default_factory=dict)  # how many times faster than each peer it should be


def measure(providers: dict[str, Callable[[], object]], rounds: int = 7, seconds: float = 0.05) -> dict[str, float]:
    """Median seconds per call of each provider."""
    repeats = {}
    for name, call in providers.items():
        call()
        begin = time.perf_counter()
        call()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - begin, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(t) for name, t in times.items()}


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
def copy_bandwidth(threads: int) -> float:
    """Bytes a second of a large copy, reads and writes counted."""
    source = torch.zeros(64 << 20)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure({"copy": lambda: target.copy_(source)}, 9)["copy"]


def run(title: str, cases: Iterable[Case], arguments: argparse.ArgumentParser | None = None) -> None:
    """Time the cases and print a table: time of each provider, ratios, share of what the machine can do."""
    args = (arguments or parser()).parse_args()
    torch.set_num_threads(args.threads)
    if args.isa:
        _C.set_isa_limit(args.isa)
    peak, bandwidth = multiply_add_peak(args.threads), copy_bandwidth(args.threads)
    print(
        f"{title}: {args.threads} threads, {_C.isa()}, torch {torch.__version__}; "
        f"{peak / 1e9:.0f} GFLOP/s fp32, {bandwidth / 1e9:.1f} GB/s copy"
    )
    for case in cases:
        if args.only and args.only not in case.label:
            continue
        times = measure(case.providers, args.rounds)
        ours, *peers = times
        text = f"{case.label:44} {ours} {_time(times[ours])}"
        missed = False
        for peer in peers:
            ratio, want = times[peer] / times[ours], case.want.get(peer)
            short = want is not None and ratio < want
            missed |= short
            text += f" | {peer} {_time(times[peer])} {ratio:6.2f}x" + (f" (want {want:g}x)" if short else "")
        if case.flops and peak:
            text += f" | {100 * case.flops / times[ours] / peak:3.0f}% of peak"
        if case.bytes:
            text += f" | {100 * case.bytes / times[ours] / bandwidth:3.0f}% of copy"
        print(text, flush=True)
        if args.json:
            record = {"title": title, "label": case.label, "seconds": times, "want": case.want}
            with open(args.json, "a") as file:
                print(json.dumps(record), file=file)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:9.1f} us" if seconds < 0.01 else f"{seconds * 1e3:9.2f} ms"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser()
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument(
        "--isa", choices=["scalar", "avx2", "avx512", "avx512bf16"], help="use no higher instruction set"
    )
    result.add_argument("--only", help="cases whose label contains this")
    result.add_argument("--rounds", type=int, default=7)
    result.add_argument("--json", help="append a record per case to this file")
    return result
