"""Weights that transformers ties by their names when it loads a model, and the changes that are needed if they are no
longer tied."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def ties(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, str]]]:
    """Each model of transformers in ``model``, its name, and the pairs of names that its configuration ties: a
    parameter and the parameter that it is the same as."""
    for path, module in model.named_modules():
        pairs = getattr(module, "get_expanded_tied_weights_keys", dict)()
        if pairs:
            yield module, path, pairs


def tied_names(model: nn.Module) -> dict[str, str]:
    """All those pairs, by their names in ``model``."""
    return {
        f"{path}.{name}".lstrip("."): f"{path}.{source}".lstrip(".")
        for _, path, pairs in ties(model)
        for name, source in pairs.items()
    }


def parameter_at(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None)


def tie(model: nn.Module, name: str, source: str) -> None:
    """Make the parameter ``name`` the same object as ``source``."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter_at(model, source))


def forget_broken_ties(model: nn.Module) -> None:
    """Change the configuration so that weights that are no longer tied are not tied again, neither by ``tie_weights()``
    nor by a reader of the files that ``save_pretrained`` writes.

    A configuration ties all weights or none, and encoder-decoders scale their outputs by the same option. For these,
    and if some weights are still tied, the option stays: transformers then compares the two tensors of a file, and does
    not tie tensors that differ.
    """
    one = lambda module, pair: parameter_at(module, pair[0]) is parameter_at(module, pair[1])
    for module, _, pairs in list(ties(model)):
        left = {pair[0]: pair[1] for pair in pairs.items() if one(module, pair)}
        if left != pairs:
            module._tied_weights_keys = left
        if not left and not getattr(module.config, "is_encoder_decoder", False):
            module.config.tie_word_embeddings = False
    for module in model.modules():
        known = getattr(module, "all_tied_weights_keys", None)
        if known:
            module.all_tied_weights_keys = dict(pair for pair in known.items() if one(module, pair))
