"""What the laws of test_conformance.py need to know of a method: one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import models
import torch

from peftops.methods.vera import VeRAConfig

VECTORS = torch.linspace(-2, 2, 5 * 64).view(5, 64)


@dataclass
class Example:
    """A small case of a method. The default fits whatever adapts the linear layers of any model."""

    config: object
    build: Callable = models.mlp
    starts_as_base: bool = True
    merges: bool = True
    on_nf4: bool = True  # whether it can change layers in 4 bits

    def run(self, model):
        return model(VECTORS) if self.build is models.mlp else model(models.tokens()).logits


EXAMPLES: dict[type, Example] = {
    VeRAConfig: Example(VeRAConfig(r=24)),
}


def example_of(config_class: type) -> Example:
    return EXAMPLES.get(config_class) or Example(config_class())
