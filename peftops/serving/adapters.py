"""From a model and files of adapters to a pool."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..attaching import METHODS
from ..attaching.targets import ALL_LINEAR, Target, find_targets
from ..integrations.peft_files import read_adapter
from ..methods.lora import LoRA
from ..nn import PREFIX, AdapterPool, base_of, module_at, sizes


def pool_for(
    model: nn.Module,
    *,
    adapters: int = 16,
    rank: int = 16,
    target: Target = ALL_LINEAR,
    page_size: int = 16384,
    dtype: torch.dtype = torch.float32,
) -> AdapterPool:
    """A pool whose working set holds this many adapters of this rank, for the layers of a model and where that is. Any
    number of them, of any ranks, may be added: what is not in use makes room.

    Args:
        target: which layers adapters may adapt, as in :class:`~peftops.LoRAConfig`.
        page_size, dtype: see :class:`~peftops.AdapterPool`.

    Raises:
        ValueError: adapters or rank is below 1; nothing matches the target.

    Examples:
        >>> from peftops.serving import pool_for
        >>> pool = pool_for(llama(), adapters=2, rank=4, target=["q_proj"])
    """
    if adapters < 1 or rank < 1:
        raise ValueError(f"pool_for needs at least 1 adapter of rank 1, not {adapters} of rank {rank}")
    bases = {path: base_of(module_at(model, path)) for path in find_targets(model, target)}
    layers = {path: sizes(base) for path, base in bases.items()}
    line = lambda n: -(-n // 64) * 64  # factor rows fill whole lines
    elements = rank * sum(line(k) + line(n) for k, n in layers.values())
    pages = adapters * -(-elements // page_size)
    device = next(iter(bases.values())).weight.device
    return AdapterPool(layers, pages=pages, page_size=page_size, slots=2 * adapters, dtype=dtype, device=device)


def add_adapter(pool: AdapterPool, name: str, directory: str | os.PathLike) -> None:
    """Read a LoRA adapter that :func:`peftops.save` or HF PEFT wrote into a pool's host memory.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: the method is none whose change is the product of an A and a B of linear layers.
        ValueError: a file is damaged, or is for another model; nothing has changed then.

    Examples:
        >>> from peftops.serving import add_adapter, pool_for
        >>> peftops.save(peftops.attach(llama(), peftops.LoRAConfig(r=2)), "adapter")
        >>> add_adapter(pool_for(llama()), "mine", "adapter")
    """
    config, tensors = read_adapter(directory)
    method = METHODS[type(config)]
    if not issubclass(method, LoRA) or method.adapt is not LoRA.adapt:
        raise TypeError(f"{directory} is an adapter of {method.__name__}; a pool holds A and B, as LoRA has them")
    factors, scalings = {}, {}
    for key in tensors:
        layer, _, end = key.removeprefix(PREFIX).rpartition(".lora_A.weight")
        if layer and not end:
            other = f"{PREFIX}{layer}.lora_B.weight"
            if other not in tensors:
                raise ValueError(f"{directory} lacks {other}")
            factors[layer] = tensors[key], tensors[other]
            scalings[layer] = config.rank_and_scaling(layer)[1]
    experts = [layer for layer in factors if layer.partition(".base_layer")[0].endswith("experts")]
    if experts:
        raise TypeError(f"{directory} adapts {experts[0].partition('.base_layer')[0]}; a pool holds A and B of linear "
                        "layers, and experts' are none: merge such an adapter into a model of its own")  # fmt: skip
    left = sorted(set(tensors) - {f"{PREFIX}{layer}.lora_{x}.weight" for layer in factors for x in "AB"})
    if left or not factors:
        raise ValueError(f"{directory} has {left[0] if left else 'no tensors'}; a pool holds A and B of linear layers")
    pool.add(name, factors, scalings)
