"""HF PEFT's LoRA on layers in codes: one fused operator instead of three products, and merging that knows codes.

PEFT chooses the class of an adapted layer by a chain of functions; the last one is ``dispatch_default``. ``import
peftops`` makes that function ask this file first.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..nn import MergeError, dense_matrix, dequantized, is_quantized, low_rank, own_rows, quantized_like

_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # starts that read, or change, the base's numbers
_READS_NUMBERS = {"use_dora": "DoRAConfig", "kasa_config": None, "monteclora_config": None}


class CodesLoraLinear(Linear):
    """A layer of PEFT's over an :class:`~peftops.nn.NF4Linear` or :class:`~peftops.nn.GroupLinear`."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        start = str(config.init_lora_weights).lower()
        if start.startswith(_STARTS):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} is subtracted from the numbers of the base's "
                "weight, and PEFT cannot read them out of codes; start on the dense model"
            )
        for option, ours in _READS_NUMBERS.items():
            if getattr(config, option, None):
                instead = f"; peftops.attach(model, peftops.{ours}(...)) can" if ours else ""
                raise ValueError(
                    f"{option} needs the numbers of the base's weight, which PEFT cannot read out of codes{instead}"
                )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        plain = not (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or base._forward_hooks
            or base._forward_pre_hooks
            or hasattr(base, "_hf_hook")
        )
        if not plain or not active or any(name in self.lora_variant or self.lora_bias[name] for name in active):
            return super().forward(x, *args, **kwargs)
        first, *others = active
        A, B, scaling, dropout = self._of(first)
        p = getattr(dropout, "p", 0.0)
        y = low_rank(base, x, A.weight, B.weight, scaling, dropout=p, training=dropout.training)
        for name in others:
            A, B, scaling, dropout = self._of(name)
            y = y + (scaling * B(A(dropout(self._cast_input_dtype(x, A.weight.dtype))))).to(y.dtype)
        return y

    def _of(self, name: str) -> tuple[nn.Linear, nn.Linear, float, nn.Module]:
        return self.lora_A[name], self.lora_B[name], self.scaling[name], self.lora_dropout[name]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the numbers that the codes stand for, and quantise those again; a warning tells the
        error. :meth:`unmerge` puts the original codes back."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.base_layer
        if own_rows(base.weight) is not base.weight:
            raise ValueError(
                "merging needs whole weights, and fully_shard has cut them: save the adapter, and merge it in one "
                "process"
            )
        before = dense_matrix(base)
        after, bias = before.clone(), base.bias
        for name in names:
            if name in self.lora_variant:  # which knows its own product, or that it cannot be merged
                after = self.lora_variant[name].merge_safe(self, name, after)
            else:
                after += self.get_delta_weight(name).to(after)
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError("lora_bias=True cannot be merged into a layer without a bias")
                bias = bias + self.lora_B[name].bias * self.scaling[name]
        if not all(part.isfinite().all() for part in (after, bias) if part is not None):
            raise ValueError(f"merging {', '.join(names)} would give weights that are not finite")
        codes = quantized_like(after.to(base.weight.dtype), base.weight)
        error = MergeError.between(before, after, dequantized(codes, torch.float32), quantized=True)
        warnings.warn(
            f"the adapter changes this weight by {error.change:.3%}, and quantising it again errs by "
            f"{error.rounding:.3%}; merge into a dense model to keep what it learnt",
            stacklevel=2,
        )
        if not self.merged:
            self._unmerged = [(base.weight, base.bias)]  # in a list, a module does not register them
        base.weight = nn.Parameter(codes, requires_grad=False)
        base.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.merged_adapters += names

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        ((self.base_layer.weight, self.base_layer.bias),) = self._unmerged
        self._unmerged, self.merged_adapters[:] = [], []


_DEFAULT = lora_model.dispatch_default


def _dispatch(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is None and isinstance(base, nn.Linear) and is_quantized(base.weight):
        return CodesLoraLinear(target, adapter_name, config=config, **kwargs)
    return _DEFAULT(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)


lora_model.dispatch_default = _dispatch
