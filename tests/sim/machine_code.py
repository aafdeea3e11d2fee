"""Machine code of the CUDA kernels, for each architecture, and ptxas's words about it.

What is newer than the sources is not compiled again, and of several processes that want the same, one compiles it.
"""

import fcntl
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sim import KERNELS, ROOT

SOURCES = ROOT / "csrc/kernels"
FOLDER = ROOT / "build" / "machine_code"
FLAGS = ["-O3", "-std=c++17", "-DPEFTOPS_CUDA", "-I", str(ROOT / "csrc"), "-Xptxas=-v"]


def compiled(source: Path, arch: str) -> tuple[Path, str]:
    """A file of kernels as a cubin, and the output of nvcc and ptxas.

    Raises:
        RuntimeError: it does not compile.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    cubin = FOLDER / f"{source.stem}_{arch}.cubin"
    log = cubin.with_suffix(".log")
    with open(cubin.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(p.stat().st_mtime for p in SOURCES.rglob("*") if p.suffix in (".h", ".cuh", ".cu"))
        if not log.exists() or log.stat().st_mtime < newest:
            begin = time.time()
            command = ["nvcc", "-cubin", f"-arch=sm_{arch}", *FLAGS, "-o", str(cubin), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stdout}{done.stderr}")
            log.write_text(done.stdout + done.stderr)
            os.utime(log, (begin, begin))  # a source that changed meanwhile is newer
    return cubin, log.read_text()


def logs(architectures: tuple[str, ...]) -> str:
    """The output for all kernels."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = [pool.submit(compiled, source, arch) for arch in architectures for source in KERNELS]
        return "".join(file.result()[1] for file in files)
