"""The benches' harness: what it measures with, and where its cases are made. No time is asserted."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "bench"
sys.path.append(str(FOLDER))

import harness  # noqa: E402


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("bench_*.py")))
def test_every_bench_imports_and_measures_nothing_yet(name):
    for peer in ("bitsandbytes", "peft", "transformers"):
        pytest.importorskip(peer)
    importlib.import_module(name)


def test_cases_are_made_on_the_device_and_timed_outside_of_it():
    def cases():
        for n in (3, 4):
            x = torch.randn(n)
            yield harness.Case(f"{n} {x.device.type}", {"ours": lambda: None})

    found = []
    for case in harness.on_device(cases(), "meta"):
        found.append(case.label)
        assert torch.get_default_device().type == "cpu"
    assert found == ["3 meta", "4 meta"]


def test_a_gpu_is_timed_by_its_own_events(monkeypatch):
    """In milliseconds, call by call, each after a write to all of the cache; the median counts."""
    log, clock = [], iter([0.0, 1.0, 5.0, 7.0, 9.0, 109.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)
            log.append("event")

        def elapsed_time(self, end):
            return end.at - self.at

    class Memory:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: Memory())
    assert harness.cuda_seconds(lambda: log.append("call"), 3) == pytest.approx(2e-3)  # of 1, 2 and 100 ms
    assert log == ["flush", "event", "call", "event"] * 3 + ["wait"]


def table(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    monkeypatch.setattr(harness, "multiply_add_peak", lambda threads: 1e9)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda threads, device="cpu": 1e9)
    times = {"peftops": 0.5, "dense": 1.0}
    monkeypatch.setattr(harness, "measure", lambda providers, rounds, device: times)
    case = dict(providers={"peftops": None, "dense": None}, flops=25e7, bytes=1e8, want={"dense": 3})
    old = torch.get_num_threads()
    try:
        harness.run("title", iter([harness.Case("one", **case), harness.Case("two", **case)]))
    finally:
        torch.set_num_threads(old)
    return capsys.readouterr().out.splitlines()


def test_the_table_says_times_ratios_and_shares(monkeypatch, capsys):
    header, line = table(monkeypatch, capsys, "--only", "two", "--threads", "1")
    assert header.startswith("title: 1 threads") and line.startswith("two ")
    for text in ("peftops    500.00 ms", "2.00x (want 3x)", "50% of peak", "20% of copy"):
        assert text in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--device cuda needs a GPU"):
        table(monkeypatch, capsys, "--device", "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_peaks():
    assert harness.matmul_peak(torch.bfloat16, "cuda", 2048) > harness.matmul_peak(torch.float32, "cuda", 2048) > 0
