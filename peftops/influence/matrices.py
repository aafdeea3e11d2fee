"""The matrices of an adapter as linear layers: the input of each, and the gradient of its output.

The low-rank term y = s (x A^T) B^T is two linear layers, and neither is a module: one op computes both, together
with the base. But their inputs and gradients follow from x and from the gradient G of the adapted layer's output:

    A: input x,        gradient of its output s G B
    B: input x A^T,    gradient of its output s G
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attaching import attachment, hosts
from ..methods.lora import LoRA
from ..nn import EXPERTS, LINEAR, Adapter, kind_of


@dataclass(frozen=True)
class Matrix:
    """One trainable matrix ``[out, in]``.

    Attributes:
        name: of the parameter, dotted, from the adapted layer's name on.
        adapter: the module whose calls are watched.
        is_input: whether its input is the input of the adapted layer itself, which other layers may share.
        inputs, gradients: from the layer's input ``[n, t, in]`` and output gradient ``[n, t, out]`` to its own.
    """

    name: str
    adapter: Adapter
    is_input: bool
    inputs: Callable[[Tensor], Tensor]
    gradients: Callable[[Tensor], Tensor]


def matrices(model: nn.Module) -> list[Matrix]:
    """The trained matrices of the active adapter.

    Raises:
        ValueError: no adapter is attached, or none of its parameters trains.
        TypeError: its method has parameters other than A and B of linear layers.
    """
    name, found = attachment(model).switch.active, []
    for path, host in hosts(model):
        if name not in host.adapters:
            continue
        adapter = host.adapters[name]
        if not isinstance(adapter, LoRA) or type(adapter).adapt is not LoRA.adapt or kind_of(host.base) != LINEAR:
            kind = " of experts" if kind_of(host.base) == EXPERTS else ""
            what = f"{path or 'the model'} has {type(adapter).__name__}'s{kind}"
            raise TypeError(f"influence needs A and B of linear layers, as LoRA trains them; {what}")
        A, B, scaling = adapter.lora_A, adapter.lora_B, adapter.scaling
        if A.requires_grad:
            found.append(Matrix(f"{path}.lora_A", adapter, True, lambda x: x, lambda g, B=B, s=scaling: s * (g @ B)))
        if B.requires_grad:
            found.append(Matrix(f"{path}.lora_B", adapter, False, lambda x, A=A: x @ A.t(), lambda g, s=scaling: s * g))
    if not found:
        raise ValueError("nothing of the active adapter trains; influence is of parameters that do")
    return found


# Called with a matrix, the name of the first one that has the same input, a [n, t, in] and ds [n, t, out].
Take = Callable[[Matrix, str, Tensor, Tensor], None]


@contextmanager
def watched(found: list[Matrix], size: int, take: Take) -> Iterator[None]:
    """Inside, each backward pass through an adapted layer calls ``take`` with the inputs and gradients of its matrices.

    Args:
        size: n, the number of examples in the batch; every layer's input must have n rows.

    Raises:
        ValueError: (in the forward pass) a layer's input has another number of rows.
    """
    sources: dict[int, tuple[str, Tensor]] = {}  # by id: the tensor itself is kept, so ids stay its own

    def after_forward(matrix: Matrix) -> Callable:
        def hook(module: nn.Module, args: tuple, y: Tensor) -> None:
            x = args[1].detach()
            if len(x) != size:
                raise ValueError(f"the input of {matrix.name} has {len(x)} rows for a batch of {size} examples")
            source = matrix.name
            if matrix.is_input:
                source, _ = sources.setdefault(id(args[1]), (matrix.name, args[1]))
            rows = lambda t: (t[:, None] if t.dim() == 2 else t.flatten(1, -2)).float()
            if y.requires_grad:
                y.register_hook(lambda g: take(matrix, source, matrix.inputs(rows(x)), matrix.gradients(rows(g))))

        return hook

    handles = [matrix.adapter.register_forward_hook(after_forward(matrix)) for matrix in found]
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
