"""Registers, shared memory, spills and occupancy of every CUDA kernel, from what ptxas says on six architectures.

python tests/sim/resources.py     writes docs/cuda_resources.md, unless a kernel spills or has too few warps
"""

import re
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from sim import ROOT  # noqa: E402
from sim.machine_code import logs  # noqa: E402

TABLE = ROOT / "docs" / "cuda_resources.md"

# Per multiprocessor: warps, blocks, bytes of shared memory (CUDA programming guide, compute capabilities).
LIMITS = {
    "80": (64, 32, 164 << 10),
    "86": (48, 16, 100 << 10),
    "89": (48, 24, 100 << 10),
    "90": (64, 32, 228 << 10),
    "100": (64, 32, 228 << 10),
    "120": (48, 24, 100 << 10),
}
WARPS_PER_BLOCK = 8  # nearly all kernels of this package launch 256 threads
OTHER_WARPS = {r"few_rows<.*, 16>": 16, "paged_by_|gather_parts": 4}
LEAST_WARPS = 8  # of a multiprocessor
# Which ptxas does not see: sizeof(ManyMemory), sizeof(BackwardMemory) of 64 or 128 rows, sizeof(RowsSums),
# sizeof(PagedTiles).
DYNAMIC_SHARED = {
    "many_rows<": 65 << 10,
    "many_back<.*, 64>": 43 << 10,
    "many_back<.*, 128>": 59 << 10,
    "few_rows<.*, 1, 8>": 5 << 10,
    "few_rows<.*, 1, 16>": 10 << 10,
    "few_rows<.*, (2, 16|4, 8)>": 36 << 10,
    "group_rows<.*, 1>": 9 << 10,
    "group_rows<.*, 2>": 18 << 10,
    "paged_by_mma<.*, 64>": 27 << 10,
    "paged_by_mma<.*, 128>": 34 << 10,
}
REGISTERS, REGISTERS_AT_A_TIME, RESERVED_SHARED = 65536, 256, 1024

REASONS = """Kernels are launched with 256 threads, which is their `__launch_bounds__`: eight warps divide a table of
16 or 256 rows evenly, and up to eight such blocks fill a multiprocessor. `few_rows` of 9 to 16 rows, or of a small
weight, has 512: all of a multiprocessor's registers, in one block, so that twice as much of the weight is on its way.
A minimum of blocks is given for `add_prompt`, `prompt_gradients`, `expand`, `paged_by_lanes`, `paged_by_mma` and
`few_rows` of 8 rows, two, and for `group_rows`, `shrink`, `multi_shrink` and `operands`, one: left to itself, ptxas
aims at more than they have registers for, and spills.
`few_rows` and `many_rows` are held to few blocks by 32 KB of tables and by registers that hold what is under way:
loads in flight, not warps, hide the memory's latency there. `many_rows` with two stripes has one block of 8 warps, and
so has `many_back` with 128 rows: 64 sums a thread, and tensor cores are kept busy by 32 mma a step and warp.
`any_rows` and `any_back` are the fp32 tiles for what tensor cores do not take; `operands` writes what a library
multiplies in their place. `paged_by_mma`, `paged_by_lanes` and `gather_parts` have 128 threads."""


def parse(log: str) -> list[dict]:
    """One entry for each kernel and architecture."""
    names = subprocess.run(["c++filt"], input=log, capture_output=True, text=True, check=True).stdout
    pattern = (
        r"Compiling entry function '(?P<name>.*?)' for 'sm_(?P<arch>\d+)'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
        r"(?P<rest>[^\n]*)"
    )
    entries = []
    for found in re.finditer(pattern, names, re.S):
        entry = {key: int(found[key]) for key in ("stack", "stores", "loads", "registers")}
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        name = re.sub(r"peftops::(cuda::)?|\(anonymous namespace\)::|^void ", "", found["name"]).split("(")[0]
        dynamic = sum(size for pattern, size in DYNAMIC_SHARED.items() if re.match(pattern, name))
        entry["shared"] = (int(shared[1]) if shared else 0) + dynamic
        entries.append({"name": name, "arch": found["arch"], **entry})
    return sorted(entries, key=lambda e: (e["name"], int(e["arch"])))


def resident_warps(entry: dict) -> int:
    warps, blocks, shared = LIMITS[entry["arch"]]
    of_kernel = [warps for pattern, warps in OTHER_WARPS.items() if re.match(pattern, entry["name"])]
    per_block = (*of_kernel, WARPS_PER_BLOCK)[0]
    per_warp = -(-entry["registers"] * 32 // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    by_registers = REGISTERS // per_warp // per_block
    by_shared = shared // (entry["shared"] + RESERVED_SHARED)
    return per_block * min(blocks, warps // per_block, by_registers, by_shared)


def faults(log: str) -> list[str]:
    """Warnings, spilled registers and idle multiprocessors, which no kernel should have, in sentences."""
    found = ["nvcc or ptxas warns"] if "warning" in log else []
    for e in parse(log):
        if e["stores"] + e["loads"] + e["stack"]:
            found.append(f"{e['name']} spills registers on sm_{e['arch']}")
        if resident_warps(e) < LEAST_WARPS:
            found.append(f"{e['name']} has {resident_warps(e)} warps on a multiprocessor of sm_{e['arch']}")
    return found


def cell(entry: dict) -> str:
    return f"{entry['registers']}, {resident_warps(entry)}/{LIMITS[entry['arch']][0]}"


def written() -> dict[tuple[str, str], str]:
    """The cells of the table as it is, by kernel and architecture."""
    rows = re.findall(r"^\| `(.*?)` \| \d+ \| (.*) \|$", TABLE.read_text(), re.M)
    return {(name, arch): c for name, cells in rows for arch, c in zip(LIMITS, cells.split(" | "), strict=True)}


def table(entries: list[dict], others: dict[tuple[str, str], str] | None = None) -> str:
    """The document. ``others`` has the cells of architectures that were not compiled for."""
    cells = (others or {}) | {(e["name"], e["arch"]): cell(e) for e in entries}
    text = "# What the CUDA kernels use\n\nGenerated by `python tests/sim/resources.py`.\n" + REASONS + "\n\n"
    text += "Registers per thread, and warps that a multiprocessor holds of those it could:\n\n"
    text += (
        "| kernel | shared memory | "
        + " | ".join(f"sm_{arch}" for arch in LIMITS)
        + " |\n|---|---:|"
        + "---:|" * len(LIMITS)
        + "\n"
    )
    for name in sorted({e["name"] for e in entries}):
        (shared,) = (e["shared"] for e in entries if e["name"] == name and e["arch"] == "80")
        text += f"| `{name}` | {shared} | " + " | ".join(cells.get((name, a), "") for a in LIMITS) + " |\n"
    return text + "\nNo kernel spills a register or uses local memory, on any of these architectures.\n"


def main() -> None:
    log = logs(tuple(LIMITS))
    if found := faults(log):
        sys.exit("\n".join(found))
    TABLE.write_text(table(parse(log)))


if __name__ == "__main__":
    main()
