"""What the laws of test_conformance.py need to know of a method: one line each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

import models
import peftops
from peftops.methods.bitfit import BitFitConfig
from peftops.methods.bottleneck import BottleneckConfig
from peftops.methods.head_only import HeadOnlyConfig
from peftops.methods.llama_adapter import LLaMAAdapterConfig
from peftops.methods.longlora import LongLoRAConfig
from peftops.methods.lora import LoRAConfig
from peftops.methods.lqlora import LQLoRAConfig
from peftops.methods.norm_tuning import NormTuningConfig
from peftops.methods.prefix_tuning import PrefixTuningConfig
from peftops.methods.prompt_tuning import PromptTuningConfig
from peftops.methods.qalora import QALoRAConfig
from peftops.methods.qlora import QLoRAConfig
from peftops.methods.relora import ReLoRAConfig
from peftops.methods.surgical import SurgicalConfig
from peftops.methods.top_layers import TopLayersConfig
from peftops.methods.vera import VeRAConfig

VECTORS = torch.linspace(-2, 2, 5 * 64).view(5, 64)
IMAGES = torch.linspace(-1, 2, 2 * 12).view(2, 12).sin()


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
        with self.images(model):
            return model(VECTORS) if self.build is models.mlp else model(models.tokens()).logits

    def images(self, model):
        """Those that a method reads, while its adapter is active."""
        active = hasattr(model, "_peftops") and model._peftops.switch.active
        reads = active and getattr(self.config, "image_features", None)
        return peftops.image_prompts(model, IMAGES) if reads else contextlib.nullcontext()


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

VARIANTS: dict[str, Example] = {  # options that make a method build something else
    "lora-biases": Example(LoRAConfig(r=4, bias="all", lora_bias=True)),
    "qlora-mxfp4": Example(QLoRAConfig(format="mxfp4")),
    "llamaadapter-images": Example(
        LLaMAAdapterConfig(tokens=3, layers=2, image_features=12), models.llama, merges=False
    ),
    "llamaadapter-v2": Example(LLaMAAdapterConfig(tokens=3, layers=1, v2=True), models.llama, merges=False),
    "llamaadapter-v2-input": Example(
        LLaMAAdapterConfig(tokens=3, layers=2, image_features=12, v2=True, scale_position="input"),
        models.qwen2,
        merges=False,
    ),
}


def example_of(config_class: type) -> Example:
    return EXAMPLES.get(config_class) or Example(config_class())
