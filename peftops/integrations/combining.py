"""Several adapters of LoRA's family made into one: HF PEFT's ``add_weighted_adapter``, with the same numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attaching import attach, attachment
from ..attaching.config import check_choice, check_range
from ..attaching.targets import exact_target
from ..methods.lora import LoRAConfig
from ..methods.qlora import QLoRAConfig
from ..nn import EXPERTS, base_of, factor_shapes, kind_of, low_rank_change, matrix, module_at, opened, unwrapped
from ..nn.undo import about
from ..ops.group_tensor import all_finite
from .peft_files import adapters_of

PLAIN = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # of A and of B, each by itself
HOW = ("cat", "svd", *PLAIN, *(f"{how}_svd" for how in PLAIN[1:]))
FACTORS = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")


@torch.no_grad()
def combine(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    *,
    how: str = "cat",
    name: str = "combined",
    rank: int | None = None,
    density: float | None = None,
    signs: str = "total",
) -> nn.Module:
    """Attach one more adapter, a LoRA, that is made of others: HF PEFT's ``add_weighted_adapter``.

    ===================  ============================================================================================
    ``how``              the new adapter, of changes s B A with their weights
    ===================  ============================================================================================
    cat                  their sum, exactly; its rank is the sum of theirs. With weights of 1 it computes what PEFT
                         does with several active adapters.
    svd                  the closest of rank ``rank`` to the sum
    linear               A and B are sums each, with the roots of the weights: cheap, and rough
    ties                 as linear, of the largest elements that have the sign of most (Yadav et al. 2023, 2306.01708)
    dare_linear          as linear, of random elements (Yu et al. 2023, 2311.03099), by torch's generator
    dare_ties            random elements, then signs as in ties
    magnitude_prune      as linear, of the largest elements
    ..._svd              the same applied to the changes instead of A and B, then as svd
    ===================  ============================================================================================

    Args:
        model: changed and returned; the new adapter is the active one.
        adapters: names of attached adapters, whose layers and ranks may differ (ranks only for cat and the svd kinds).
        weights: one for each, of either sign.
        how: see above.
        name: of the new adapter.
        rank: of the new adapter, for svd kinds; by default the largest of theirs.
        density: the share of elements that is kept, in (0, 1], for the kinds but cat, svd and linear.
        signs: how ties finds the sign of most: "total" by the sum, "frequency" by count.

    Raises:
        ValueError: a name, weight or option is wrong or has no effect with ``how``; an adapter has more than products
            of two factors (DoRA, biases, ``modules_to_save``, a method that is not LoRA in HF PEFT's files); ranks
            differ; numbers are not finite, or their sum is not.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2), name="a")
        >>> _ = peftops.attach(model, peftops.LoRAConfig(r=4), name="b")
        >>> peftops.summary(peftops.combine(model, ["a", "b"], [0.7, 0.3], how="cat", name="both")).active
        'both'
    """
    state = attachment(model)
    if not isinstance(adapters, list | tuple) or not adapters or any(adapters.count(a) > 1 for a in adapters):
        raise ValueError(f"adapters must be a list of different names, not {adapters!r}")
    for adapter in adapters:
        if not isinstance(adapter, str) or adapter not in state.configs:
            raise ValueError(f"the model has no adapter named {adapter!r}; it has {', '.join(state.configs)}")
    if not isinstance(weights, list | tuple) or len(weights) != len(adapters):
        raise ValueError(f"weights must be a number for each of {list(adapters)}, not {weights!r}")
    for adapter, weight in zip(adapters, weights, strict=True):
        check_range(f"the weight of {adapter!r}", weight, -1e9, 1e9)
    _check_options(how, rank, density, signs)
    with opened(model):
        given = {adapter: _factors(model, adapter) for adapter in adapters}
        made = {}
        for path in dict.fromkeys(path for own in given.values() for path in own):
            parts = [(*own[path], weight) for own, weight in zip(given.values(), weights, strict=True) if path in own]
            base = base_of(module_at(unwrapped(model), path))
            with about(path):
                if how == "cat":
                    made[path] = _cat(parts, base)
                elif how.endswith("svd"):
                    largest = max(_rank(base, own[path][0]) for own in given.values() if path in own)
                    mix = _mixing(how.removesuffix("_svd"), density, signs)
                    made[path] = _truncated(parts, base, mix, rank or largest)
                else:
                    made[path] = _each_factor(parts, _mixing(how, density, signs), how)
                _check_sum(*made[path])
        _put(model, [state.configs[adapter] for adapter in adapters], made, name)
    return model


def _check_options(how: str, rank: int | None, density: float | None, signs: str) -> None:
    check_choice("how", how, HOW)
    check_choice("signs", signs, ("total", "frequency"))
    if how in ("cat", "svd", "linear"):
        if density is not None:
            raise ValueError(f"density={density!r} is for kinds that leave elements out, which how={how!r} does not")
    elif isinstance(density, bool) or not (isinstance(density, int | float) and 0 < density <= 1):
        raise ValueError(f"how={how!r} needs density, the share of elements that is kept, in (0, 1], not {density!r}")
    if signs != "total" and "ties" not in how:
        raise ValueError(f"signs={signs!r} is for ties, and not for how={how!r}")
    if rank is not None:
        check_range("rank", rank, 1, whole=True)
        if not how.endswith("svd"):
            raise ValueError(f"rank={rank} is for svd and the kinds that end in it, and not for how={how!r}")


Part = tuple[Tensor, Tensor, float]  # A, B, and the scaling, of a layer; with a weight at the end below


def _factors(model: nn.Module, name: str) -> dict[str, Part]:
    """The products of an adapter, by layer.

    Raises:
        ValueError: it has more than such products.
    """
    config, parts = attachment(model).configs[name], adapters_of(unwrapped(model), name)
    fields = config.as_built(parts).to_peft()
    what = f"the adapter {name!r}, of {type(config).__name__},"
    if fields["peft_type"] != "LORA" or fields.get("use_dora"):
        raise ValueError(
            f"{what} is not a product of two factors in each layer, and only such adapters can be combined"
        )
    for option, none in (("bias", "none"), ("lora_bias", False), ("modules_to_save", ())):
        value = getattr(config, option, none)
        if (tuple(value) if isinstance(value, list) else value) != none:
            raise ValueError(f"{what} has {option}={value!r}, and a weighted sum does not support that")
    plain = LoRAConfig.from_peft({**fields, "target_modules": ["any"], "init_lora_weights": True})
    result = {}
    for path, part in parts.items():
        tensors = part.stored()
        if not any(tensors.keys() == {*names} for names in FACTORS):
            raise ValueError(f"{what} has {', '.join(tensors)} in {path}, and not two factors alone")
        if not all(all_finite(tensor) for tensor in tensors.values()):
            raise ValueError(f"{what} is not finite in {path}")
        result[path] = (*(tensor.float() for tensor in tensors.values()), plain.rank_and_scaling(path)[1])
    return result


def _rank(base: nn.Module, A: Tensor) -> int:
    return A.shape[1] if kind_of(base) == EXPERTS else A.shape[0]


Weighted = tuple[Tensor, Tensor, float, float]
Mix = Callable[[list[Tensor], list[float]], Tensor]


def _cat(parts: list[Weighted], base: nn.Module) -> tuple[Tensor, Tensor]:
    if getattr(base, "groups", 1) > 1:
        raise TypeError("the channels of B are in groups, and those of several stay apart; combine with how='linear'")
    over = 1 if kind_of(base) == EXPERTS else 0
    A = torch.cat([A * (scaling * weight) for A, _, scaling, weight in parts], over)
    return A, torch.cat([B for _, B, _, _ in parts], over + 1)


def _each_factor(parts: list[Weighted], mix: Mix, how: str) -> tuple[Tensor, Tensor]:
    shapes = {tuple(A.shape) for A, _, _, _ in parts}
    if len(shapes) > 1:
        raise ValueError(f"how={how!r} takes the sums of A and of B, whose ranks differ here; 'cat' and 'svd' can")
    scaled = [scaling * weight for _, _, scaling, weight in parts]
    roots = [math.sqrt(abs(value)) for value in scaled]
    signed = [math.copysign(root, value) for root, value in zip(roots, scaled, strict=True)]
    return mix([A for A, _, _, _ in parts], signed), mix([B for _, B, _, _ in parts], roots)


def _truncated(parts: list[Weighted], base: nn.Module, mix: Mix, rank: int) -> tuple[Tensor, Tensor]:
    changes = [scaling * low_rank_change(matrix(base), A, B) for A, B, scaling, _ in parts]
    total = mix(changes, [weight for *_, weight in parts])
    _check_sum(total)
    U, S, V = torch.linalg.svd(total, full_matrices=False)
    shape_A, shape_B = factor_shapes(base, rank)
    there = min(rank, S.shape[-1])  # of a small layer; the rest is 0
    A, B = V.new_zeros(*V.shape[:-2], rank, V.shape[-1]), U.new_zeros(*U.shape[:-1], rank)
    A[..., :there, :], B[..., :there] = V[..., :there, :], (U * S[..., None, :])[..., :there]
    return A.view(shape_A), B.view(shape_B)


def _check_sum(*tensors: Tensor) -> None:
    if not all(map(all_finite, tensors)):
        raise ValueError("the weighted sum is beyond float32")


def _mixing(how: str, density: float | None, signs: str) -> Mix:
    """The sum of tensors with weights, of some elements."""

    def kept(tensor: Tensor) -> Tensor:
        if density is None or density == 1:
            return tensor
        if how.startswith("dare"):
            return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
        mask = torch.zeros_like(tensor).flatten()
        mask[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
        return tensor * mask.view_as(tensor)

    def mix(tensors: list[Tensor], weights: list[float]) -> Tensor:
        stack = torch.stack([kept(tensor) for tensor in tensors])
        weighted = stack * torch.tensor(weights, device=stack.device).view(-1, *[1] * tensors[0].dim())
        if "ties" not in how:
            return weighted.sum(0)
        most = stack.sum(0) if signs == "total" else stack.sign().sum(0)
        agree = stack.sign() == torch.where(most >= 0, 1, -1)
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    return mix


def _put(model: nn.Module, configs: list[LoRAConfig], made: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    """Attach the new adapter, whose scaling is 1."""
    inner = unwrapped(model)
    ranks = {path: _rank(base_of(module_at(inner, path)), A) for path, (A, _) in made.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    longest_first = sorted(ranks, key=len, reverse=True)  # (a name may be the end of another one)
    pattern = {re.escape(path): ranks[path] for path in longest_first} if len({*ranks.values()}) > 1 else {}
    options = dict(r=r, alpha=float(r), target=exact_target(inner, made), rank_pattern=pattern)
    options |= dict(alpha_pattern={key: float(rank) for key, rank in pattern.items()}, rslora=False)
    same = {type(config) for config in configs} in ({LoRAConfig}, {QLoRAConfig})
    attach(model, replace(configs[0], **options) if same else LoRAConfig(**options), name=name)
    for path, part in adapters_of(inner, name).items():
        part.restore(dict(zip(part.stored(), made[path], strict=True)))
