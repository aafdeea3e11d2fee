"""How much memory a training step takes, counted on the meta device: every tensor that the step would allocate, and
when it would free it. The layers' own code runs, so no method needs a formula.

It does not count workspace inside of kernels, memory that an allocator wastes, and the libraries' own memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..nn import head_loss, splits
from ..ops.packed_tensor import PackedTensor

ATTENTION = "peftops_plan"  # in transformers' registry


def parts_of(tensor: Tensor) -> Iterable[Tensor]:
    """The tensors that hold a tensor's bytes."""
    return tensor.parts().values() if isinstance(tensor, PackedTensor) else (tensor,)


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside it make, for as long as they live.

    Args:
        before: tensors that exist already and are not to be counted.
    """

    def __init__(self, before: Iterable[Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._before = [part.untyped_storage() for tensor in before for part in parts_of(tensor)]
        self._known: set[int] = {storage._cdata for storage in self._before}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, PackedTensor):
                self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, storage._cdata, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Flash(torch.autograd.Function):
    """The tensors of torch's flash attention. (On the meta device torch would compute the matrix of all products of
    queries and keys, which it avoids on a CPU and on a GPU.)"""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, masked: bool) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        more = [query.new_empty(batch, 1, length, key.shape[2])] if masked else []
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, length, heads, dtype=torch.float32), *more)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None


def register_attention() -> None:
    """Let models of transformers be made with ``attn_implementation=ATTENTION``."""
    from transformers import AttentionInterface

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
        masked = key.shape[2] != query.shape[2]
        if masked:  # behind a prefix transformers masks, and repeats keys for each head
            heads = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        return _Flash.apply(query, key, value, masked).transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attention)


def step_peak(model: nn.Module, batch: int, length: int) -> int:
    """The largest number of bytes that forward and backward of a causal language model hold beside the tensors from
    before: tensors that autograd keeps, logits, gradients.

    Args:
        model: on the meta device, in training, as a method left it.
        batch, length: rows, and tokens of each, all of them targets.
    """
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    with Ledger([*model.parameters(), *model.buffers(), ids]) as ledger:
        if splits(model):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -length:-1]
            head_loss(model.get_output_embeddings(), hidden.flatten(0, 1), ids[:, 1:].flatten()).backward()
        else:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return ledger.peak
