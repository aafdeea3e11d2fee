"""An adapter folded into the weights, and out again."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import nn

from ..nn import MergeError
from ..nn.undo import about
from .state import attachment, hosts, is_cut


@dataclass
class MergeReport:
    """The error that merging added, by layer."""

    layers: dict[str, MergeError]

    @property
    def quantized(self) -> bool:
        """Whether a merged weight was quantised again."""
        return any(error.quantized for error in self.layers.values())

    @property
    def rounding(self) -> float:
        """Relative error of the merged weights, over all layers (root mean square)."""
        return (sum(e.rounding**2 for e in self.layers.values()) / len(self.layers)) ** 0.5

    @property
    def change(self) -> float:
        """Size of the adapter's change relative to the weights, over all layers (root mean square)."""
        return (sum(e.change**2 for e in self.layers.values()) / len(self.layers)) ** 0.5

    def __str__(self) -> str:
        what = "quantising the merged weights again" if self.quantized else "rounding the merged weights"
        return (
            f"{len(self.layers)} layers merged: the adapter changes the weights by {self.change:.3%}, "
            f"{what} errs by {self.rounding:.3%}"
        )


def merge(model: nn.Module, *, dense: bool = False) -> MergeReport:
    """Fold the active adapter into the weights, so that it costs no time; :func:`unmerge` takes it out exactly.

    Over an NF4 base, the sum has to be quantised again. That error is usually larger than the adapter's change; the
    report and a warning tell its size. ``dense=True`` merges into dense weights of the base's dtype instead.

    Raises:
        TypeError: the method cannot be merged.
        ValueError: there is no adapter, or it is merged already, or the sum is not finite, or FSDP2 has cut the model.
            The model has not changed then.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> peftops.merge(model).quantized
        False
    """
    state = attachment(model)
    name = state.switch.active
    targets = [(path, host) for path, host in hosts(model) if name in host.adapters]
    if any(host.is_merged for _, host in targets):
        raise ValueError("an adapter is merged into the model already; unmerge it first: peftops.unmerge(model)")
    if is_cut(model):
        raise ValueError(
            "merging needs whole weights, and fully_shard has cut them: save the adapter, and merge it in one process"
        )
    report = MergeReport({})
    try:
        for path, host in targets:
            with about(path or type(model).__name__):
                error = report.layers[path] = host.merge(name, dense=dense)
                if not math.isfinite(error.change + error.rounding):
                    raise ValueError("merging would give weights that are not finite")
    except BaseException:
        unmerge(model)  # all or nothing
        raise
    if report.quantized:
        warnings.warn(f"{report}. merge(model, dense=True) merges into dense weights instead.", stacklevel=2)
    return report


def unmerge(model: nn.Module) -> None:
    """Put back the layers that :func:`merge` replaced: the same bits.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> before = model(ids).logits
        >>> _ = peftops.merge(model)
        >>> peftops.unmerge(model)
        >>> torch.equal(model(ids).logits, before)
        True
    """
    for _, host in hosts(model):
        host.unmerge()
