"""A slice of ``make fuzz``: some damaged files of each kind, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

KINDS = [
    "adapter",
    "config",
    "bitsandbytes",
    "gguf",
    "report",
    "checkpoint",
    "gptq",
    "awq",
    "codes",
    "trainer",
    "calibration",
]


@pytest.mark.skipif(sys.platform == "win32", reason="memory and time are bounded by POSIX")
def test_damaged_files_end_in_a_sentence():
    command = [sys.executable, Path(__file__).with_name("run.py"), "--kind", *KINDS, "--cases", "30"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    assert all(f"{kind} 29" in run.stdout for kind in KINDS)
