"""What the laws of test_conformance.py need to know of a method: one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import models
from peftops.methods.bitfit import BitFitConfig
from peftops.methods.bottleneck import BottleneckConfig
from peftops.methods.head_only import HeadOnlyConfig
from peftops.methods.llama_adapter import LLaMAAdapterConfig
from peftops.methods.longlora import LongLoRAConfig
from peftops.methods.lqlora import LQLoRAConfig
from peftops.methods.norm_tuning import NormTuningConfig
from peftops.methods.prefix_tuning import PrefixTuningConfig
from peftops.methods.prompt_tuning import PromptTuningConfig
from peftops.methods.qalora import QALoRAConfig
from peftops.methods.relora import ReLoRAConfig
from peftops.methods.surgical import SurgicalConfig
from peftops.methods.top_layers import TopLayersConfig
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
    requantizes: bool = True  # whether merging quantises again, then

    lr: float = 0.02

    def run(self, model):
        return model(VECTORS) if self.build is models.mlp else model(models.tokens()).logits


EXAMPLES: dict[type, Example] = {
    VeRAConfig: Example(VeRAConfig(r=24)),
    BottleneckConfig: Example(BottleneckConfig(activation="gelu"), models.llama, merges=False),
    NormTuningConfig: Example(NormTuningConfig(), models.llama, requantizes=False),
    BitFitConfig: Example(BitFitConfig(), models.qwen2, requantizes=False),
    TopLayersConfig: Example(TopLayersConfig(layers=1), models.llama, on_nf4=False),
    HeadOnlyConfig: Example(HeadOnlyConfig(), models.llama, requantizes=False),
    SurgicalConfig: Example(SurgicalConfig(), models.llama, on_nf4=False),
    LLaMAAdapterConfig: Example(LLaMAAdapterConfig(tokens=3, layers=2), models.llama, merges=False),
    QALoRAConfig: Example(QALoRAConfig(), on_nf4=False),
    LongLoRAConfig: Example(LongLoRAConfig(r=4, group=64), models.llama),
    LQLoRAConfig: Example(LQLoRAConfig(r=8, bits=4.3, iterations=2)),
    ReLoRAConfig: Example(ReLoRAConfig(r=8, dropout=0.0)),
    PromptTuningConfig: Example(PromptTuningConfig(tokens=3), models.llama, starts_as_base=False, merges=False),
    PrefixTuningConfig: Example(PrefixTuningConfig(tokens=3), models.llama, starts_as_base=False, merges=False),
}


def example_of(config_class: type) -> Example:
    return EXAMPLES.get(config_class) or Example(config_class())
