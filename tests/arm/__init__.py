"""The kernels of AArch64 on another CPU: cross-compiled, and run by qemu-aarch64 in a process of their own.

The bindings are this machine's, so that every test of an operator runs as it is; see README.md.
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "arm"
COMPILER = os.environ.get("PEFTOPS_ARM_CXX", "aarch64-linux-gnu-g++")
EMULATOR = "qemu-aarch64"
active: str | None = None  # the build that torch.ops.peftops runs at the moment, if it is one of these
CPU = os.environ.get("PEFTOPS_ARM_CPU", "max")  # of qemu: cortex-a53 has nothing beyond the first of its kind


def contracts() -> str:
    """A header: every contract, and PEFTOPS_ARM_KERNELS(kernel), the list of their kernels with their arguments."""
    headers = sorted((ROOT / "csrc/kernels").glob("*.h"))
    listed = [re.findall(r"PEFTOPS_CPU_KERNELS\((.*?)\)\n", header.read_text(), re.S) for header in headers]
    kernels = re.findall(r"Kernel<([^;]+)> (\w+);", "".join("".join(found) for found in listed))
    includes = [f'#include "kernels/{header.name}"' for header, has in zip(headers, listed, strict=True) if has]
    rows = " ".join(f"kernel({name}, {args})" for args, name in kernels)
    return "\n".join([*includes, f"#define PEFTOPS_ARM_KERNELS(kernel) {rows}", ""])


def build() -> None:
    """The guest for AArch64, and the module that calls it for this machine; seconds where nothing changed."""
    import torch

    header = BUILD / "all_kernels.h"
    BUILD.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != contracts():
        header.write_text(contracts())
    cross = "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"
    native.build(BUILD / "guest", "arm_guest", f"-DPEFTOPS_ARM_TESTS={BUILD}", *cross)
    root = Path(torch.__file__).parent
    native.build(BUILD / "host", "arm_ops", f"-DPEFTOPS_ARM_TESTS={BUILD}", f"-DPEFTOPS_TORCH={root}")


@functools.cache
def operators() -> list[str] | str:
    """The operators whose kernels run on the other CPU as torch.ops.peftops_arm, or the reason why none do."""
    import torch

    import peftops  # noqa: F401  (defines torch.ops.peftops)

    for program in (COMPILER, EMULATOR):
        if not shutil.which(program):
            return f"needs {program}"
    build()
    texts = "".join(path.read_text() for path in sorted((ROOT / "csrc/ops").glob("*.cpp")))
    names = re.findall(r'm\.impl\("(\w+)"', texts)
    library = torch.library.Library("peftops_arm", "DEF")
    for name in names:
        library.define(str(getattr(torch.ops.peftops, name).default._schema).removeprefix("peftops::"))
    operators.keep = library
    torch.ops.load_library(BUILD / "host" / "libarm_ops.so")
    return names


@functools.cache
def guest(isa: str) -> subprocess.Popen:
    command = [EMULATOR, "-cpu", CPU, str(BUILD / "guest" / "arm_guest"), isa, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


@contextlib.contextmanager
def on_cpu_tensors(isa: str = "neon"):
    """Meanwhile torch.ops.peftops runs the kernels of AArch64, in that build of them."""
    import torch

    global active
    names = operators()
    process = guest(isa)
    module = ctypes.CDLL(str(BUILD / "host" / "libarm_ops.so"))
    module.arm_guest(process.stdin.fileno(), process.stdout.fileno(), process.pid)

    def elsewhere(operator):
        def run(*args, **options):
            module.arm_begin()
            return operator(*args, **options)

        return run

    library = torch.library.Library("peftops", "IMPL")
    try:
        active = isa
        for name in names:
            warnings.filterwarnings("ignore", "Warning only once for all operators", module="torch.library")
            library.impl(name, elsewhere(getattr(torch.ops.peftops_arm, name).default), "CPU", allow_override=True)
        yield
    finally:
        active = None
        library._destroy()
