"""Hands the build of peftops._C to CMakeLists.txt, the only place that knows compilers and flags.

Environment: PEFTOPS_CUDA=auto|on|off (auto: if torch has CUDA and nvcc is there; the GPU is never asked),
CMAKE_ARGS, DEBUG=1, MAX_JOBS.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
CUDA_MODULE = "_C_cuda" + sysconfig.get_config_var("EXT_SUFFIX")  # of this Python; another's may lie beside it


def fail(sentence: str) -> None:
    raise SystemExit(f"peftops: {sentence}")


def find_torch() -> Path | None:
    """The installed torch. pip builds in an environment of its own, so the one that it builds for is
    searched as well: no second torch is downloaded to compile against. Headers and libraries will do;
    nothing is imported."""
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys([*sys.path, paths["platlib"], paths["purelib"]]):
        if (Path(folder or ".") / "torch" / "version.py").is_file():
            return Path(folder or ".").resolve() / "torch"
    return None


def torch_versions(torch: Path) -> tuple[str, str | None]:
    """torch's version, and that of CUDA if it was built with it."""
    text = (torch / "version.py").read_text()
    version = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.M)
    cuda = re.search(r"^cuda(?:: [^=]*)? = ['\"]([^'\"]+)", text, re.M)
    if not version:
        fail(f"cannot read the version of torch in {torch}; install it again: pip install --force-reinstall torch")
    return version[1], cuda and cuda[1]


def wants_cuda(torch_cuda: str | None) -> bool:
    switch = os.environ.get("PEFTOPS_CUDA", "auto").lower()
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    kernels = any(ROOT.glob("csrc/kernels/cuda/*.cu"))
    if switch not in ("auto", "on", "off"):
        fail(f"PEFTOPS_CUDA must be auto, on or off, not {switch!r}")
    if switch == "on":
        if not kernels:
            fail("PEFTOPS_CUDA=on, but this version has no CUDA kernels yet; leave it at auto")
        if not torch_cuda:
            fail("PEFTOPS_CUDA=on needs a torch that was built with CUDA; install one, or set PEFTOPS_CUDA=off")
        if not nvcc:
            fail("PEFTOPS_CUDA=on needs nvcc; install the CUDA toolkit, or set PEFTOPS_CUDA=off")
    return switch == "on" or (switch == "auto" and bool(torch_cuda and nvcc and kernels))


class CMakeBuild(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.in_source = bool(self.inplace)  # setuptools clears the flag while it builds, and copies afterwards

    def build_extension(self, ext: Extension) -> None:
        if not shutil.which("cmake"):
            fail("CMake is missing; install it: pip install cmake ninja")
        if not any(shutil.which(c) for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c):
            fail("a C++17 compiler is missing; install GCC or Clang (Debian, Ubuntu: apt install g++)")
        torch = find_torch()
        if torch is None:
            fail("torch is missing; install it: pip install 'torch>=2.10'")
        version, cuda = torch_versions(torch)
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
            fail(f"torch {version} is too old; install 2.10 or newer: pip install -U torch")

        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if os.environ.get("DEBUG") else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PEFTOPS_TORCH": torch,
            "PEFTOPS_TORCH_VERSION": version,
            "PEFTOPS_CUDA": "ON" if wants_cuda(cuda) else "OFF",
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        build = [f"-D{name}={value}" for name, value in options.items()]
        extra = os.environ.get("CMAKE_ARGS", "").split()
        # pip gives every editable build an empty folder; ninja wants the last one's objects.
        kept = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        folder = kept if self.editable_mode or self.in_source else self.build_temp
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        self.call("cmake", "-S", ROOT, "-B", folder, *generator, *build, *extra)
        self.call("cmake", "--build", folder, "--target", "_C", "--parallel", jobs)
        if not wants_cuda(cuda):
            (output / CUDA_MODULE).unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()  # peftops._C, the only one that setuptools knows of
        (ROOT / "peftops" / CUDA_MODULE).unlink(missing_ok=True)
        built = Path(self.build_lib, "peftops", CUDA_MODULE)
        if built.exists():
            shutil.copy2(built, ROOT / "peftops")

    def call(self, *command: object) -> None:
        try:
            subprocess.run([str(part) for part in command], check=True)
        except subprocess.CalledProcessError as error:
            command = " ".join(map(str, command[:2]))
            fail(f"{command} failed with exit status {error.returncode}; its messages are above")


setup(
    ext_modules=[Extension("peftops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # What the build needs beyond pyproject.toml. With a torch at hand, nothing: pip must not fetch another. Nor when
    # this file is run by itself: setuptools would fetch one into .eggs, and the build has a sentence to say instead.
    setup_requires=["torch>=2.10"] if "setuptools.build_meta" in sys.modules and not find_torch() else [],
)
