"""CUDA kernels on the CPU: builds the interpreter of this folder and drives it. See README.md.

``Simulator`` is one process-wide device: the interpreter is a stand-in for libcudart.so.13, loaded once.
"""

import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import native

ROOT = Path(__file__).resolve().parents[2]
ARCH = os.environ.get("PEFTOPS_SIM_ARCH", "80")  # whose PTX is run
BUILD = ROOT / "build" / ("sim" if ARCH == "80" else f"sim{ARCH}")
KERNELS = sorted(p for p in (ROOT / "csrc/kernels/cuda").glob("*.cu") if "_sm90" not in p.stem)  # those of any GPU
LIBRARY_SWITCH = "PEFTOPS_NF4_LIBRARY"  # see csrc/ops/by_library.h
active = False  # whether torch.ops.peftops runs in the simulator at the moment


class Finding(Exception):
    """What the interpreter found wrong with a kernel or its launch."""


def cmake(target: str, *options: str) -> None:
    """Builds a target of CMakeLists.txt into build/sim."""
    native.build(BUILD, target, "-DPEFTOPS_SIM=ON", f"-DPEFTOPS_SIM_ARCH={ARCH}", *options)


class Simulator:
    def __init__(self, library: Path):
        self.lib = lib = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        lib.sim_load.restype = ctypes.c_void_p
        for name in ("sim_error", "sim_reports", "sim_text"):
            getattr(lib, name).restype = ctypes.c_char_p
        lib.sim_last_stream.restype = ctypes.c_void_p
        self.options()

    def options(self, *, races=True, memory=True, seed=0, perturb=False, watchdog=2_000_000_000, last_blocks=0) -> None:
        """What is checked, and how warps take turns: see ``Options`` in machine.h. What is left out is set back."""
        limits = ctypes.c_uint64(watchdog), ctypes.c_uint64(last_blocks)
        self.lib.sim_options(int(races), int(memory), ctypes.c_uint32(seed), int(perturb), *limits)

    def error(self) -> str:
        return self.lib.sim_error().decode()

    def load(self, ptx: str) -> int:
        module = self.lib.sim_load(ptx.encode())
        if not module:
            raise Finding(self.error())
        return module

    def allow(self, array, read_only: bool = False) -> None:
        """Lets kernels touch a NumPy array or a tensor."""
        if hasattr(array, "data_ptr"):
            address, size = array.data_ptr(), array.numel() * array.element_size()
        else:
            address, size = array.ctypes.data, array.nbytes
        self.lib.sim_allow(ctypes.c_void_p(address), ctypes.c_size_t(size), int(read_only))

    def forbid_all(self) -> None:
        self.lib.sim_forbid_all()

    def launch(self, module: int, kernel: str, grid, block, args, shared: int = 0) -> dict:
        """Runs a kernel; ``args`` are ctypes values, or arrays for their address. The report of the launch."""
        self.forget()
        values = [ctypes.c_void_p(a.ctypes.data) if hasattr(a, "ctypes") else a for a in args]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*[ctypes.addressof(v) for v in values])
        dims = [(ctypes.c_uint32 * 3)(*d, *[1] * (3 - len(d))) for d in (grid, block)]
        status = self.lib.sim_launch(ctypes.c_void_p(module), kernel.encode(), *dims, ctypes.c_size_t(shared), pointers)
        if status:
            raise Finding(self.error())
        return self.reports()[0]

    def pretend(self, capability: int = 80, multiprocessors: int = 108) -> None:
        """To be another GPU, for launchers that ask; without arguments an A100."""
        self.lib.sim_pretend(capability, multiprocessors)

    def forget(self) -> None:
        self.lib.sim_forget()

    def reports(self) -> list[dict]:
        """One report for each launch since ``forget``."""
        return json.loads(self.lib.sim_reports(0).decode())

    def table(self) -> str:
        """The same for people: what each line of the kernels cost."""
        return self.lib.sim_reports(1).decode()

    def texts(self) -> list[str]:
        """The PTX of every module that was loaded."""
        return [self.lib.sim_text(k).decode() for k in range(self.lib.sim_modules())]

    def covered(self, module: int, kernel: str, line: int) -> bool:
        """Whether any launch ran an instruction of this line of a kernel's body."""
        return bool(self.lib.sim_covered(module, kernel.encode(), line))

    def replace(self, module: int, ptx: str) -> None:
        """Gives a module another text; launchers that know it run that from now on."""
        if not self.lib.sim_replace(module, ptx.encode()):
            raise Finding(self.error())


def has_real_runtime() -> bool:
    """Whether this process holds NVIDIA's own runtime, whose place the stand-in cannot take."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libcudart" in line}
    return any(str(BUILD) not in path for path in loaded)


@functools.cache
def simulator() -> Simulator | str:
    """The device, or the reason why there is none."""
    if sys.platform != "linux":
        return "the stand-in for libcudart needs Linux"
    if not shutil.which("cmake"):
        return "needs cmake"
    if has_real_runtime():
        return "this torch brings NVIDIA's own libcudart"
    cmake("cuda_sim")
    return Simulator(BUILD / "libcudart.so.13")


def kernel(body: str, params: str, *, shared: int = 0, name: str = "k", outside: str = "") -> str:
    """PTX of one kernel with plenty of registers, for tests that write instructions by hand."""
    declared = f".shared .align 16 .b8 smem[{shared}];" if shared else ""
    params = ", ".join(f".param .{p.split()[0]} {p.split()[1]}" for p in re.split(r",\s*", params))
    return f""".version 9.0
.target sm_80
.address_size 64
{outside}
.visible .entry {name}({params})
{{
  .reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<60>; .reg .b64 %d<40>; .reg .f32 %f<40>; .reg .f64 %g<20>;
  {declared}
  {body}
}}
"""


STREAM = 0x5EED  # the current stream, as tests/sim/torch/seam.cpp has it


@functools.cache
def cuda_ops() -> list[str] | str:
    """The operators whose CUDA bindings run in the simulator as torch.ops.peftops_sim, or the reason why none do. An
    operator without such a binding raises NotImplementedError there."""
    import torch

    import peftops  # noqa: F401  (defines torch.ops.peftops)

    device = simulator()
    if isinstance(device, str):
        return device
    if not shutil.which("nvcc"):
        return "needs nvcc"
    root = Path(torch.__file__).parent
    cmake("cuda_sim_ops", "-DPEFTOPS_CUDA=ON", f"-DPEFTOPS_TORCH={root}")
    names = re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc/ops/library.cpp").read_text())
    library = torch.library.Library("peftops_sim", "DEF")
    for name in names:
        library.define(str(getattr(torch.ops.peftops, name).default._schema).removeprefix("peftops::"))
    cuda_ops.keep = library
    torch.ops.load_library(BUILD / "libcuda_sim_ops.so")
    return names


@contextlib.contextmanager
def nf4_library(way: str):
    """Meanwhile nf4_linear on CUDA takes its kernels ("never"), torch's product ("always") or the faster ("auto")."""
    old = os.environ.get(LIBRARY_SWITCH)
    os.environ[LIBRARY_SWITCH] = way
    try:
        yield
    finally:
        os.environ.pop(LIBRARY_SWITCH)
        if old is not None:
            os.environ[LIBRARY_SWITCH] = old


@contextlib.contextmanager
def on_cpu_tensors(library: str = "never", **options):
    """Meanwhile torch.ops.peftops runs the CUDA kernels, in the simulator, wherever it is given CPU tensors."""
    import torch

    global active
    simulator().options(**options)
    operators = torch.library.Library("peftops", "IMPL")
    try:
        active = True
        for name in cuda_ops():
            warnings.filterwarnings("ignore", "Warning only once for all operators", module="torch.library")
            operators.impl(name, getattr(torch.ops.peftops_sim, name).default, "CPU", allow_override=True)
        with nf4_library(library):
            yield simulator()
    finally:
        active = False
        operators._destroy()
        simulator().options()
