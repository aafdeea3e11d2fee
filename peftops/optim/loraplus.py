"""LoRA+, Hayou et al. 2024 (arXiv:2402.12354): B learns faster than A.

    lr_A = lr,  lr_B = ratio * lr    ratio about 16, more for harder tasks

It is not a method of its own but parameter groups, for any adapter of the LoRA family.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attaching.config import check_range


def loraplus_groups(
    model: nn.Module, lr: float, *, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` as groups for an optimizer.

    As in HF PEFT, vectors (DoRA's lengths, VeRA's and Tied-LoRA's scalings) learn at B's rate and without weight
    decay.

    Args:
        lr: of A and of all other trained parameters.
        ratio: of B's rate to it, at least 1.
        weight_decay: of matrices.

    Raises:
        ValueError: a number is out of range, or nothing trains.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> sorted({group["lr"] for group in peftops.loraplus_groups(model, lr=1e-4, ratio=16)})
        [0.0001, 0.0016]
    """
    check_range("lr", lr, 0)
    check_range("ratio", ratio, 1)
    slow, fast, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            leaf = name.rpartition(".")[2]
            (vectors if parameter.dim() < 2 else fast if leaf.endswith("_B") else slow).append(parameter)
    if not (slow or fast or vectors):
        raise ValueError(f"nothing trains in this {type(model).__name__}; attach an adapter first")
    groups = [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": fast, "lr": ratio * lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": ratio * lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
