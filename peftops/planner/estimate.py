"""The memory of each method on a model, from its configuration alone."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attaching import METHODS, adapted_layers, attach
from ..attaching.config import check_choice
from ..integrations.hf import model_config
from ..methods.lora import LoRAConfig
from ..nn import ExpertsLinear, Select
from ..optim import AdamW8bit
from ..optim.checkpointing import compute_again
from . import trace

# The bytes of state that an optimizer keeps of a parameter, by its name in `peftops finetune --optimizer`.
MOMENTS = {"adamw": lambda p: 8 * p.numel(), "adamw8bit": AdamW8bit.state_bytes}


@dataclass(frozen=True)
class Estimate:
    """The memory that training by one method takes, in bytes.

    Attributes:
        method: its name, as ``peftops finetune --method`` has it.
        trainable: parameters.
        weights: of all frozen parameters and buffers.
        optimizer: of the trained parameters, in float32, and of the two moments that the optimizer keeps of each.
        activations: the most that a step holds beside those: tensors for backward, logits, gradients. The loss is that
            of ``peftops finetune``, :func:`peftops.language_model_loss`; ``model(labels=...)`` takes more, because it
            makes all logits at once.
        why_not: why the method cannot be used on this model, or None if it can. The other attributes are valid only
            then.
    """

    method: str
    trainable: int = 0
    weights: int = 0
    optimizer: int = 0
    activations: int = 0
    why_not: str | None = None

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations

    @property
    def adapter(self) -> int:
        """Bytes of the adapter's file, and of one more task on the same base."""
        return 4 * self.trainable


def skeleton(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> nn.Module:
    """The model at ``path`` on the meta device: shapes, and no weights.

    Raises:
        FileNotFoundError: there is no model at ``path``.
        ValueError: transformers cannot build a causal language model from it.

    Examples:
        >>> from peftops.planner import skeleton
        >>> llama().save_pretrained("model")
        >>> skeleton("model").lm_head.weight.device
        device(type='meta')
    """
    from transformers import AutoModelForCausalLM

    config = model_config(path, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        raise ValueError(f"{path} is quantised already; plan with the model that it was made from")
    trace.register_attention()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=trace.ATTENTION, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        kind = config.model_type
        raise ValueError(
            f"{path}: transformers builds no causal language model of a {kind}, or none whose attention "
            f"can be counted: {str(error).splitlines()[0]}"
        ) from None
    if getattr(model, "_can_set_experts_implementation", bool)():  # torch's own has no meta kernel in float32
        model.set_experts_implementation("peftops")
    model.tie_weights()
    model.config.pad_token_id = None  # with it, some models would read ids, which do not exist here
    return model


def estimate(
    model: nn.Module,
    config: object,
    *,
    batch: int = 8,
    length: int = 512,
    checkpointing: bool = False,
    optimizer: str = "adamw",
) -> Estimate:
    """Estimate the memory of training ``model`` by a method.

    Args:
        model: a :func:`skeleton`; left as it is.
        config: options of the method.
        batch, length: rows computed at once, and tokens per row.
        checkpointing: compute the activations of each block again in backward.
        optimizer: one of ``MOMENTS``.

    Raises:
        ValueError: batch or length is below 1, length is above the model's number of positions, or the optimizer is
            unknown.

    Examples:
        >>> from peftops.planner import estimate, skeleton
        >>> llama().save_pretrained("model")
        >>> found = estimate(skeleton("model"), peftops.LoRAConfig(r=2), batch=2, length=16)
        >>> found.method, found.total > 0
        ('lora', True)
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if batch < 1 or length < 1 or (most and length > most):
        limit = f" (length at most {most})" if most else ""
        raise ValueError(f"batch and length must be at least 1{limit}, not {batch} and {length}")
    check_choice("optimizer", optimizer, tuple(MOMENTS))
    name = METHODS[type(config)].__name__.lower()
    model = copy.deepcopy(model).train()
    try:
        with warnings.catch_warnings():  # the layers that stay dense are in the plan's count
            warnings.filterwarnings("ignore", ".* in 3-D tensors that")
            attach(model, config)
    except (ValueError, TypeError) as error:
        return Estimate(name, why_not=str(error))
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        return Estimate(name, why_not="what it makes of a layer depends on the weights, which a plan does not read")
    if any(
        isinstance(host.base, ExpertsLinear) and isinstance(adapter, Select)
        for _, host in adapted_layers(model)
        for adapter in host.adapters.values()
    ):
        return Estimate(name, why_not="it trains experts whole, and a plan cannot tell the memory of that")
    if checkpointing:
        compute_again(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    bytes_of = lambda tensors: sum(part.nbytes for t in tensors for part in trace.parts_of(t))
    return Estimate(
        name,
        trainable=sum(p.numel() for p in trained),
        weights=bytes_of([*frozen, *model.buffers()]),
        optimizer=bytes_of(trained) + sum(map(MOMENTS[optimizer], trained)),
        activations=trace.step_peak(model, batch, length),
    )


def estimate_all(model: nn.Module, *, r: int = 16, **options: Any) -> list[Estimate]:
    """The estimate of every method, with its default options, and with rank ``r`` if it is of LoRA's family."""
    kinds = sorted(METHODS, key=lambda kind: METHODS[kind].__name__.lower())
    return [estimate(model, kind(r=r) if issubclass(kind, LoRAConfig) else kind(), **options) for kind in kinds]
