"""What ptxas makes of the CUDA kernels, instruction by instruction: machine code by NVIDIA's disassembler."""

import collections
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from sim.machine_code import compiled


def disassembler() -> Path | None:
    """nvdisasm of the package nvidia-cuda-nvdisasm (the extra "dev")."""
    for folder in sys.path:
        for found in sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvdisasm")):
            return found
    return None


def disassemble(source: Path, arch: str) -> str:
    cubin, _ = compiled(source, arch)
    return subprocess.run([disassembler(), "-c", cubin], check=True, capture_output=True, text=True).stdout


class Instruction(NamedTuple):
    opcode: str  # with its modifiers
    operands: str
    guarded: bool


def programs(text: str) -> dict[str, tuple[list[Instruction], dict[int, int]]]:
    """For each kernel its instructions in order, and where a jump at a place goes to."""
    found = {}
    for section in re.split(r"\n\.text\.", text)[1:]:
        mangled, body = section.split(":", 1)
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
        name = re.sub(r"peftops::(cuda::)?|\(anonymous namespace\)::|^void ", "", name).split("(")[0].strip()
        code, labels, jumps = [], {}, {}
        for line in body.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif at := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
                if at[2].startswith("BRA") and (target := re.search(r"\.L_x_\d+", at[3])):
                    jumps[len(code)] = target[0]
                code.append(Instruction(at[2], at[3].strip(), bool(at[1])))
        found[name] = code, {at: labels[label] for at, label in jumps.items() if label in labels}
    return found


def kernels(text: str) -> dict[str, tuple[list[str], list[tuple[int, int]]]]:
    """For each kernel its opcodes in order, with their modifiers, and the ranges of its loops."""
    return {
        name: ([i.opcode for i in code], [(to, at + 1) for at, to in jumps.items() if to <= at])
        for name, (code, jumps) in programs(text).items()
    }


def written(instruction: Instruction) -> range:
    """The registers that an instruction writes: of its first operand, unless it has no result."""
    opcode = instruction.opcode
    first = re.match(r"R(\d+)", instruction.operands)
    if not first or opcode.startswith(("ST", "RED", "SYNCS", "HGMMA")):
        return range(0)
    wide = 4 if ".128" in opcode else 2 if ".64" in opcode or ".WIDE" in opcode or opcode.startswith("CS2R") else 1
    return range(int(first[1]), int(first[1]) + wide)


def overwritten(code: list[Instruction], jumps: dict[int, int]) -> list[str]:
    """Instructions that write to a register of an HGMMA's A before the wait for it, along any path."""
    found = []
    for start, product in enumerate(code):
        a = re.match(r"R\d+, R(\d+)", product.operands) if product.opcode.startswith("HGMMA") else None
        open_, seen = [start + 1] if a else [], set()
        while open_:
            at = open_.pop()
            if at in seen or at >= len(code) or code[at].opcode.startswith("WARPGROUP.DEPBAR"):
                continue
            seen.add(at)
            if set(written(code[at])) & set(range(int(a[1]), int(a[1]) + 4)):
                found.append(f"{code[at].opcode} {code[at].operands} after {product.opcode} {product.operands}")
                continue
            leaves = code[at].opcode.startswith(("BRA", "EXIT"))
            open_ += [jumps[at]] if at in jumps else []
            open_ += [at + 1] if not leaves or code[at].guarded else []
    return found


def main_loop(opcodes: list[str], loops: list[tuple[int, int]], wanted: str = "HMMA.16816") -> list[str]:
    """The loop with the largest share of ``wanted``."""
    bodies = [opcodes[begin:end] for begin, end in loops]
    return max(bodies, key=lambda body: sum(op.startswith(wanted) for op in body) / len(body), default=[])


def histogram(opcodes: list[str]) -> collections.Counter:
    return collections.Counter(op.split(".")[0] for op in opcodes)
