"""`peftops serve --port` as a process of its own, with a tiny random model and adapters."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops

ROOT = Path(__file__).resolve().parents[2]


def make_model(folder):
    models.llama(tied=False).save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")


def make_adapter(folder, seed, r=4, **options):
    model = peftops.attach(models.llama(tied=False), peftops.LoRAConfig(r=r, **options))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    peftops.save(model, folder)


def copy_adapter(source, target, change):
    """Another adapter with what ``change`` makes of each tensor."""
    target.mkdir(parents=True)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({name: change(name, t) for name, t in tensors.items()}, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())


class Process:
    """A server; ``url`` is what clients want, ``log`` what it has written."""

    def __init__(self, *arguments, key=None):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment.pop("PEFTOPS_API_KEY", None)
        command = [sys.executable, "-m", "peftops", "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            env=environment | ({"PEFTOPS_API_KEY": key} if key else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self._reader.start()
        first = self.process.stdout.readline()
        found = re.search(r" on (http://\S+)/v1$", first)
        assert found, f"{first}{self.stop()}"
        self.url = found[1]

    @property
    def log(self):
        return "".join(self.lines)

    def stop(self):
        """Its log, after an end in order."""
        self.process.terminate()
        self.process.wait(60)
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return self.log


@contextlib.contextmanager
def serving(*arguments, key=None):
    server = Process(*arguments, key=key)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
