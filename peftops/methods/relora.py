"""ReLoRA, Lialin et al. 2023 (arXiv:2307.05695): updates of high rank as a sum of low-rank ones.

    y = W x + b + s B A D(x);  every R steps: W += s B A, then A starts anew (Kaiming uniform) and B at 0

The model starts as it was, and a restart does not change its function. After k restarts the rank of the change of W is
up to (k + 1) r. All other parameters (embeddings, norms, head, biases) train in full, as in the paper. Call
:func:`relora_step` after each step of the optimizer: it restarts, and prunes the optimizer's memory of A and B. Between
restarts, :func:`relora_schedule` warms the learning rate up again. (The authors' code zeroes A for a pre-trained model,
so nothing learns before the first restart. Here A is never 0.)

A restart changes the base permanently: :func:`peftops.detach` leaves the changed base, and files hold the base's
weights after the first restart. A base in 4 bits is quantised again, with an error that the report tells.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..attaching import MergeReport, attachment, each_target, hosts, register, state_of
from ..attaching.config import Config, check_choice, check_range
from ..attaching.selection import copies
from ..nn import EXPERTS, LINEAR, Adapter, MergeError, Select, is_quantized, kind_of, low_rank
from ..nn.stored_base import BASE_KEYS, base_tensors
from ..optim.restarts import prune_state
from .lora import LoRA, LoRAConfig


@dataclass(frozen=True)
class ReLoRAConfig(LoRAConfig):
    """Options of ReLoRA: those of :class:`LoRAConfig`, with the paper's defaults, and

    Args:
        every: R, the steps between restarts.
        rest: whether embeddings, norms, head and biases train, too.
        prune: what a restart does to the optimizer's memory of A and B: "reset" zeroes it, "random" zeroes a share,
            "magnitude" the smallest share.
        prune_ratio: that share, in [0, 1).
        restarts: the number of restarts so far; files store it.

    Examples:
        >>> model = peftops.attach(llama(), peftops.ReLoRAConfig(r=2, every=10))
        >>> peftops.summary(model).active
        'default'
    """

    peft_type: ClassVar[str] = "RELORA"
    target_field: ClassVar[str | None] = None  # a file has tensors of other layers, too
    to_peft = Config.to_peft
    from_peft = classmethod(Config.from_peft.__func__)

    r: int = 128
    alpha: float | None = 32
    dropout: float = 0.1
    every: int = 1000
    rest: bool = True
    prune: str = "reset"
    prune_ratio: float = 0.9
    restarts: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("every", self.every, 1, whole=True)
        check_choice("prune", self.prune, ("reset", "random", "magnitude"))
        check_range("prune_ratio", self.prune_ratio, 0, 1)
        check_range("restarts", self.restarts, 0, whole=True)


@register(ReLoRAConfig)
class ReLoRA(LoRA):
    layers: ClassVar = (LINEAR,)
    peft_keys: ClassVar = {**LoRA.peft_keys, **BASE_KEYS, "lora_bias": "lora_bias"}

    @staticmethod
    def build(model: nn.Module, config: ReLoRAConfig) -> dict[str, Adapter]:
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        found: dict[str, Adapter] = {}
        for path, base in each_target(ReLoRA, model, config).items():
            if uses[id(base.weight)] > 1:
                raise ValueError(f"{path} shares its weight with another layer, which a restart would change, too")
            found[path] = ReLoRA(base, config, path)
        if config.restarts and state_of(model):
            raise ValueError("these restarts changed the base, but other adapters of this model need the old base")
        # Experts are most of a model: they do not train, and attaching warns about that.
        left = lambda layer, leaf: kind_of(layer) == EXPERTS or is_quantized(getattr(layer, leaf))
        other = lambda path, layer, leaf: path not in found and not left(layer, leaf)
        return found | copies(Select, model, other, None) if config.rest else found

    def __init__(self, base: nn.Module, config: ReLoRAConfig, layer: str):
        super().__init__(base, config, layer)
        self.restarts, self._base = config.restarts, [base]  # in a list, so that it is no submodule
        bias = base.bias if config.rest else None
        self.lora_bias = None if bias is None else nn.Parameter(bias.detach().to(torch.float32, copy=True))

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        own = self.lora_bias is not None
        y = low_rank(base, x, *self.factors(), self.scaling, dropout=self.dropout, training=self.training, bias=not own)
        return y + self.lora_bias.to(y.dtype) if own else y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().merged(weight, bias)[0], bias if self.lora_bias is None else self.lora_bias.detach()

    def stored(self) -> dict[str, Tensor]:
        return super().stored() | (base_tensors(self._base[0]) if self.restarts else {})

    def restart(self, base: nn.Module) -> MergeError:
        """Fold B A into the base's own weight and start anew; returns the error of merging."""
        merged, error = self.merge_into(base, dense=False)
        base.weight.copy_(merged.weight)  # in place: others may hold the same tensor
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B.zero_()
        self.restarts += 1
        return error


@torch.no_grad()
def relora_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> MergeReport | None:
    """Restart the active ReLoRA adapter if ``step`` steps are a multiple of its ``every``.

    Args:
        optimizer: its memory of A and B is pruned in place; its count of steps goes on.
        step: the number of steps that it has taken.

    Returns:
        The error of merging, or None if no restart was due.

    Raises:
        ValueError: the adapter is not a ReLoRA, is merged, is not finite, or is not the only one. Nothing has changed
            then.

    Examples:
        >>> model = peftops.attach(llama(), peftops.ReLoRAConfig(r=2, every=2))
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        >>> reports = []
        >>> for step in (1, 2):
        ...     model(input_ids=ids, labels=ids).loss.backward()
        ...     optimizer.step()
        ...     reports.append(peftops.relora_step(model, optimizer, step))
        >>> [report is not None for report in reports]
        [False, True]
    """
    state = attachment(model)
    name = state.switch.active
    config = state.configs.get(name)
    if not isinstance(config, ReLoRAConfig):
        raise ValueError(f"relora_step needs an active ReLoRA adapter, not {type(config).__name__}")
    if step % config.every:
        return None
    if len(state.configs) > 1 or any(host.is_merged for _, host in hosts(model)):
        raise ValueError("a restart changes the base: the adapter must be the only one, and unmerged")
    found = [(path, host) for path, host in hosts(model) if isinstance(host.adapters[name], ReLoRA)]
    for path, host in found:
        if not all(factor.isfinite().all() for factor in host.adapters[name].factors()):
            raise ValueError(f"A or B of {path} is not finite; nothing was merged")
    report = MergeReport({path: host.adapters[name].restart(host.base) for path, host in found})
    factors = [factor for _, host in found for factor in host.adapters[name].factors()]
    prune_state(optimizer, factors, config.prune, config.prune_ratio)
    state.configs[name] = replace(config, restarts=config.restarts + 1)
    return report
