"""What ptxas makes of the CUDA kernels, instruction by instruction: machine code by NVIDIA's disassembler."""

import collections
import re
import subprocess
import sys
from pathlib import Path

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


def kernels(text: str) -> dict[str, tuple[list[str], list[tuple[int, int]]]]:
    """For each kernel its opcodes in order, with their modifiers, and the ranges of its loops."""
    found = {}
    for section in re.split(r"\n\.text\.", text)[1:]:
        mangled, body = section.split(":", 1)
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
        name = re.sub(r"peftops::(cuda::)?|\(anonymous namespace\)::|^void ", "", name).split("(")[0].strip()
        opcodes, labels, jumps = [], {}, []
        for line in body.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(opcodes)
            elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
                if code[1].startswith("BRA") and (target := re.search(r"\.L_x_\d+", code[2])):
                    jumps.append((target[0], len(opcodes)))
                opcodes.append(code[1])
        loops = [(labels[target], at + 1) for target, at in jumps if labels.get(target, at + 1) <= at]
        found[name] = opcodes, loops
    return found


def main_loop(opcodes: list[str], loops: list[tuple[int, int]], wanted: str = "HMMA.16816") -> list[str]:
    """The loop with the largest share of ``wanted``."""
    bodies = [opcodes[begin:end] for begin, end in loops]
    return max(bodies, key=lambda body: sum(op.startswith(wanted) for op in body) / len(body), default=[])


def histogram(opcodes: list[str]) -> collections.Counter:
    return collections.Counter(op.split(".")[0] for op in opcodes)
