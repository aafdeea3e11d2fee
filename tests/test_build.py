"""What CMakeLists.txt tells the compiler."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_pybind11_comes_before_the_copy_that_torch_carries(tmp_path):
    """torch 2.10 to 2.12 have a pybind11 in their headers that refuses to be compiled for the stable ABI."""
    pybind11 = pytest.importorskip("pybind11")
    options = {
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "PEFTOPS_TORCH": Path(torch.__file__).parent,
    }
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, *(f"-D{name}={value}" for name, value in options.items())]
    done = subprocess.run(list(map(str, configure)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    of_bindings = [entry["command"] for entry in commands if "csrc/ops/" in entry["file"]]
    assert of_bindings
    for command in of_bindings:
        first = command.index(pybind11.get_include())
        assert first < command.index(str(Path(torch.__file__).parent / "include"))
