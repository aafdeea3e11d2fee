"""Weights that transformers ties by their names as it loads a model, and what is due where they have come apart."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def ties(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, str]]]:
    """Each model of transformers in ``model``, its name, and what its configuration ties: the names, in it, of a
    parameter and of the one that this is the same as."""
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
    """Let the parameter ``name`` be the very one that ``source`` is."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter_at(model, source))


def forget_broken_ties(model: nn.Module) -> None:
    """Let nothing tie again what is tied no longer: neither ``tie_weights()`` nor who reads the files that
    ``save_pretrained`` writes.

    A configuration ties all or nothing, and encoder-decoders scale their outputs by it. There, and where a part is
    still tied, it stays: transformers compares what a file holds of both names, and leaves what differs.
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
