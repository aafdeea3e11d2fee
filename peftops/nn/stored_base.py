"""For methods that change the base itself: its weight as the tensors of an adapter's file."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.packed_tensor import PackedTensor

_NAMES = ["weight", *(part for kind in PackedTensor.FORMATS.values() for part in kind.PARTS)]
BASE_KEYS = {f"base_{name.lstrip('_')}": f"base_{name.lstrip('_')}" for name in _NAMES}


def base_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a dense or quantised layer's weight. They are no copies, so a reader can copy into them."""
    weight = layer.weight
    parts = weight.parts() if isinstance(weight, PackedTensor) else {"weight": weight.detach()}
    return {f"base_{name.lstrip('_')}": part for name, part in parts.items()}
