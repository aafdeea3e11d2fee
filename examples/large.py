"""Random checkpoints of models that are larger than memory, and the memory that a process takes."""

import json
import math
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig


def anonymous() -> int:
    """Bytes of memory that no file is behind."""
    kilobytes = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes[1])


@contextmanager
def measured(what: str):
    """Prints the seconds that the inside takes, and the peak of its anonymous memory.

    The peak is sampled every few milliseconds. Only swapping could take this memory back; pages of files come and go
    and do not count.
    """
    peak, done, start = [anonymous()], threading.Event(), time.perf_counter()

    def sample() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        seconds, now = time.perf_counter() - start, anonymous()
        print(f"{what:28}{seconds:8.1f} s, peak {max(peak[0], now) / 1e9:5.2f} GB, now {now / 1e9:5.2f} GB", flush=True)


def drawn(shape: tuple[int, ...], bank: torch.Tensor) -> torch.Tensor:
    """A weight of random numbers: those of ``bank``, over and over from some place on. (Drawing 15 billion is slow.)"""
    if len(shape) == 1:
        return torch.ones(shape, dtype=bank.dtype)
    start = torch.randint(len(bank), (1,)).item()
    numbers = bank.roll(start).repeat(-(-math.prod(shape) // len(bank)))[: math.prod(shape)]
    return numbers.view(shape) / math.sqrt(shape[1])


def write(folder: Path, config: PretrainedConfig, files: dict[str, dict[str, tuple[int, ...]]]) -> int:
    """A checkpoint of random weights in bfloat16, a file at a time; how many parameters it has.

    ``files`` has the shapes of the tensors of each file. A file that is there already is not written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, bank = {}, torch.randn(2**22).bfloat16()
    for name, own in files.items():
        file = folder / f"{name}.safetensors"
        index |= dict.fromkeys(own, file.name)
        if not file.exists():
            part = file.with_suffix(".part")  # so that a file that is there is whole
            save_file({key: drawn(shape, bank) for key, shape in own.items()}, part, metadata={"format": "pt"})
            part.rename(file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    return sum(math.prod(shape) for own in files.values() for shape in own.values())
