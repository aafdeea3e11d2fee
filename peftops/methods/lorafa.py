"""LoRA-FA, Zhang et al. 2023 (arXiv:2308.03303): LoRA whose A stays as it was drawn.

    y = W x + b + s B A D(x)    dB = s G^T (D(x) A^T):  backward needs x A^T, [tokens, r], and does not need x

A in R^(r x in) starts random and is frozen, B in R^(out x r) starts at 0: the model starts as it was. With
``precondition`` the gradient of B is dB (A A^T)^-1 / s^2: the change of s B A is then closest to the change that W
would make. (This is the method of the paper's later versions; HF PEFT has it as an optimizer.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import needs_scaling
from ..nn import EXPERTS, LINEAR
from .lora import LoRA, LoRAConfig


@dataclass(frozen=True)
class LoRAFAConfig(LoRAConfig):
    """Options of LoRA-FA: those of :class:`LoRAConfig`, and

    Args:
        precondition: let B's gradient be the projection of the full weight's.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.LoRAFAConfig(r=2))
        >>> peftops.summary(model).trainable  # B alone
        8
    """

    precondition: bool = False


class _Preconditioned(torch.autograd.Function):
    """B itself, with its gradient multiplied by a matrix [r, r]."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(right)
        return B.view_as(B)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (right,) = ctx.saved_tensors
        return g @ right, None


@register(LoRAFAConfig)
class LoRAFA(LoRA):
    layers: ClassVar = (LINEAR, EXPERTS)

    def __init__(self, base: nn.Module, config: LoRAFAConfig, layer: str):
        super().__init__(base, config, layer)
        self.lora_A.requires_grad_(False)
        self.precondition = config.precondition
        if config.precondition:
            needs_scaling("LoRA-FA with precondition", self.scaling, layer)

    def factors(self) -> tuple[Tensor, Tensor]:
        if not self.precondition or not torch.is_grad_enabled():
            return self.lora_A, self.lora_B
        gram = self.lora_A @ self.lora_A.mT
        gram = gram + 1e-8 * torch.eye(self.rank, device=gram.device)  # as PEFT's: A may lack rank
        return self.lora_A, _Preconditioned.apply(self.lora_B, torch.linalg.inv(gram) / self.scaling**2)
