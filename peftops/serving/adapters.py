"""From a model and files of adapters to a pool."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..attaching import METHODS
from ..attaching.config import by_pattern
from ..attaching.targets import ALL_LINEAR, Target, find_targets
from ..integrations.peft_files import read_adapter
from ..methods.lora import LoRA
from ..nn import PREFIX, Parts, base_of, module_at, sizes
from .adapter_pool import AdapterPool
from .paged_attention import PagedModel
from .pages import Layout, Unfit


def pool_for(
    model: nn.Module,
    *,
    adapters: int = 16,
    rank: int = 16,
    target: Target = ALL_LINEAR,
    tokens: int = 16384,
    page_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterPool:
    """A pool for the layers of a model, on the model's device, whose working set holds this number of adapters of this
    rank. Any number of adapters, of any ranks, may be added: those that are not in use are evicted.

    Args:
        target: which layers adapters may adapt, as in :class:`~peftops.LoRAConfig`.
        tokens: the number of tokens whose keys and values have room as well, if :class:`Server` can put them in pages.
            On the CPU, the system hands out memory only when it is used.
        page_size: see :class:`~peftops.AdapterPool`; by default the smallest for keys and values of 16 tokens of a
            layer, or 16384 if keys and values are not in pages.
        dtype: see :class:`~peftops.AdapterPool`.

    Raises:
        ValueError: adapters or rank is below 1, or tokens negative; nothing matches the target.

    Examples:
        >>> from peftops.serving import pool_for
        >>> pool = pool_for(llama(), adapters=2, rank=4, target=["q_proj"])
    """
    if adapters < 1 or rank < 1:
        raise ValueError(f"pool_for needs at least 1 adapter of rank 1, not {adapters} of rank {rank}")
    if tokens < 0:
        raise ValueError(f"pool_for: tokens must not be negative, but is {tokens}")
    bases = {path: base_of(module_at(model, path)) for path in find_targets(model, target)}
    layers = {path: sizes(base) for path, base in bases.items()}
    line = lambda n: -(-n // 64) * 64  # factor rows fill whole lines
    elements = rank * sum(line(k) + line(n) for k, n in layers.values())
    layout = _layout(model) if tokens else None
    if page_size is None:
        least = 16384 if layout is None else max(64, -(-16 * layout.widest // dtype.itemsize))
        page_size = 1 << (least - 1).bit_length()
    pages = adapters * -(-elements // page_size)
    if layout is not None and page_size * dtype.itemsize >= layout.widest:
        pages += layout.pages(tokens, page_size * dtype.itemsize)
    device = next(iter(bases.values())).weight.device
    return AdapterPool(layers, pages=pages, page_size=page_size, slots=2 * adapters, dtype=dtype, device=device)


def _layout(model: nn.Module) -> Layout | None:
    """The sizes of a token in pages; None if the model does not fit pages (:class:`Server` then warns)."""
    was_training = model.training
    try:
        return PagedModel(model.eval()).layout
    except (Unfit, AttributeError):  # or no language model of transformers
        return None
    finally:
        model.train(was_training)


def add_adapter(pool: AdapterPool, name: str, directory: str | os.PathLike, *, parts: Parts | None = None) -> None:
    """Read a LoRA adapter that :func:`peftops.save` or HF PEFT wrote into a pool's host memory.

    Args:
        parts: if several processes share the model: this process's part, for which the pool is.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: the method's change is not a product of A and B of linear layers.
        ValueError: a file is damaged, or is for another model; nothing has changed then.

    Examples:
        >>> from peftops.serving import add_adapter, pool_for
        >>> peftops.save(peftops.attach(llama(), peftops.LoRAConfig(r=2)), "adapter")
        >>> add_adapter(pool_for(llama()), "mine", "adapter")
    """
    config, tensors = read_adapter(directory)
    method = METHODS[type(config)]
    if not issubclass(method, LoRA) or method.adapt is not LoRA.adapt:
        raise TypeError(f"{directory} is an adapter of {method.__name__}; a pool holds only A and B, as in LoRA")
    layers = {key.removeprefix(PREFIX).partition(".lora_")[0].partition(".base_layer")[0] for key in tensors}
    experts = sorted(layer for layer in layers if layer.endswith("experts"))
    if experts:
        raise TypeError(
            f"{directory} adapts {experts[0]}; a pool holds A and B of linear layers, and experts' are none: merge "
            "such an adapter into a model of its own"
        )
    factors, scalings, whole = {}, {}, config.to_peft()
    for key in tensors:
        layer, _, end = key.removeprefix(PREFIX).rpartition(".lora_A.weight")
        if layer and not end:
            other = f"{PREFIX}{layer}.lora_B.weight"
            if other not in tensors:
                raise ValueError(f"{directory} lacks {other}")
            r = by_pattern(whole["rank_pattern"], layer, whole["r"])
            if len(tensors[key]) != r:  # PEFT's file of an adapter that has started from the base's weights
                raise TypeError(
                    f"{directory} has rank {len(tensors[key])} at {layer}, and a whole change of {method.__name__} has "
                    f"rank {r}; load it into a model and save that, which completes it"
                )
            factors[layer] = tensors[key], tensors[other]
            scalings[layer] = config.rank_and_scaling(layer)[1]
    left = sorted(set(tensors) - {f"{PREFIX}{layer}.lora_{x}.weight" for layer in factors for x in "AB"})
    if left or not factors:
        raise ValueError(f"{directory} has {left[0] if left else 'no tensors'}; a pool holds A and B of linear layers")
    if parts is not None:
        factors, scalings = parts.adapter(factors, scalings)
    pool.add(name, factors, scalings)
