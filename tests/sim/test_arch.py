"""The kernels as nvcc compiles them for another architecture: cuda_bf16.h and the optimiser choose other instructions."""

import os
import shutil
import subprocess
import sys

import pytest

import sim


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_ptx_of_compute_90_passes_the_same_tests():
    """Budgets, checks and every dtype under one schedule, in a process of its own."""
    if isinstance(sim.simulator(), str) or sim.ARCH != "80":
        pytest.skip("nothing to compare with")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sim/test_budgets.py"]
    chosen = "seed1 and not quantize or schedule or seed1 and dequantize"
    env = {**os.environ, "PEFTOPS_SIM_ARCH": "90"}
    done = subprocess.run([*command, "-k", chosen], cwd=sim.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
