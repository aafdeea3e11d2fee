"""Models of transformers whose attention reads keys and values from pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.prompt import cache_name
from ..ops import paged_attention
from .pages import Layout, Unfit

NAME = "peftops_paged"
_PASS: ContextVar[Probe | Pass] = ContextVar("peftops_paged")
_HARMLESS = {"position_ids", "use_cache", "cache_position", "dropout", "is_causal", "logits_to_keep", "return_dict"}


class _Cache:
    """The methods of a cache that models and the code of masks call. There is no mask: paged_attention knows which
    tokens a token sees."""

    is_compileable = False
    _layer: int | None = None  # the layer whose attention comes next

    def __init__(self, layers: int):
        self.is_sliding = [False] * layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0

    def next_layer(self) -> int:
        layer, self._layer = self._layer, None
        if layer is None:
            raise Unfit("a layer attends without keys of its own")
        return layer


class Probe(_Cache):
    """A pass of one token that finds the sizes of the layers' keys and values, and the kind of their attention."""

    def __init__(self, layers: int):
        super().__init__(layers)
        self.heads: dict[int, tuple[int, int, int]] = {}
        self.windows: dict[int, int | None] = {}
        self.dtypes: set[torch.dtype] = set()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._layer = layer_idx
        self.heads[layer_idx] = keys.shape[1], keys.shape[3], values.shape[3]
        self.dtypes |= {keys.dtype, values.dtype}
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        self.windows[self.next_layer()] = window
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)  # one token sees itself


class Pass(_Cache):
    """The tokens of several sequences, one after the other in one row.

    Args:
        views: keys and values of each layer, as pages hold them.
        counts: new tokens of each sequence.
        lengths: int32 ``[sequences]``, with these.
        table: int32 ``[layers, sequences, most]``, the pages of each.
    """

    def __init__(self, views: list[tuple[Tensor, Tensor]], counts: list[int], lengths: Tensor, table: Tensor):
        super().__init__(len(views))
        self.views, self.counts, self.lengths, self.table = views, counts, lengths, table
        ends, size = lengths.tolist(), views[0][0].shape[2]
        self.positions = torch.cat([torch.arange(e - n, e) for n, e in zip(counts, ends, strict=True)])
        rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self._pages, self._places = table[:, rows, self.positions // size].long(), self.positions % size
        self._whole = [n == e for n, e in zip(counts, ends, strict=True)]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put new keys and values into their pages."""
        self._layer = layer_idx
        for view, new in zip(self.views[layer_idx], (keys, values), strict=True):
            view[self._pages[layer_idx], :, self._places] = new[0].transpose(0, 1)
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """``[1, tokens, heads, dv]``. For a prompt without known blocks, torch's attention is faster."""
        layer = self.next_layer()
        (keys, values), table = self.views[layer], self.table[layer]
        if max(self.counts) == 1:
            rows = query[0].transpose(0, 1)[:, :, None]
            return paged_attention(rows, keys, values, table, self.lengths, scale=scale, window=window)[None, :, :, 0]
        parts = []
        for s, (q, k, v) in enumerate(zip(*(t.split(self.counts, 2) for t in (query, key, value)), strict=True)):
            if self._whole[s] and (window is None or self.counts[s] <= window):
                part = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            else:
                part = paged_attention(
                    q, keys, values, table[s : s + 1], self.lengths[s : s + 1], scale=scale, window=window
                )
            parts.append(part.transpose(1, 2))
        return torch.cat(parts, 1)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls."""
    strange = [name for name, x in more.items() if not (x is None or x is False or name in _HARMLESS)]
    if strange or mask is not None or more.get("is_causal") is False:
        raise Unfit(f"its attention takes {', '.join(strange) or 'a mask'}")
    return _PASS.get().attend(query, key, value, scaling, sliding_window), None


class PagedModel:
    """A model of transformers, and how to run it over pages.

    Raises:
        Unfit: its attention does not work with pages.
    """

    def __init__(self, model: nn.Module):
        from transformers import AttentionInterface, PreTrainedConfig

        AttentionInterface.register(NAME, _attend)
        config = model.config.get_text_config()
        if model.get_input_embeddings().weight.device.type != "cpu":
            raise Unfit("pages of a server are on the CPU alone")
        configs = {
            id(m.config): m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)
        }
        self.model, self._configs, self._cache_name = model, [*configs.values()], cache_name(model)
        self.layout = self._probe(config)

    def run(self, cache: Probe | Pass, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """Logits ``[len(keep), vocabulary]`` of a row of tokens."""
        with self._paged(cache):
            return self.model(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=True,
                logits_to_keep=keep,
                **{self._cache_name: cache},
            ).logits[0]

    @contextlib.contextmanager
    def _paged(self, cache: Probe | Pass) -> Iterator[None]:
        before, token = [config._attn_implementation for config in self._configs], _PASS.set(cache)
        try:
            for config in self._configs:
                config._attn_implementation = NAME
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation = own
            _PASS.reset(token)

    @torch.no_grad()
    def _probe(self, config: Any) -> Layout:
        own, layers = config._attn_implementation, config.num_hidden_layers
        if own not in ("sdpa", "eager"):
            raise Unfit(f"its attention is {own}, and neither sdpa nor eager")
        windows, probe = _windows(config), Probe(layers)
        try:
            self.run(probe, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor([0]))
        except Unfit:
            raise
        except Exception as error:
            raise Unfit(f"a token over pages failed with {type(error).__name__}: {error}") from error
        if sorted(probe.heads) != list(range(layers)) or sorted(probe.windows) != list(range(layers)):
            raise Unfit(
                "not all of its layers keep keys and values, or compute attention, as transformers' attention does"
            )
        seen = [probe.windows[i] for i in range(layers)]
        if seen != windows:
            raise Unfit("its configuration and its attention have different windows")
        heads = [probe.heads[i] for i in range(layers)]
        if len(probe.dtypes) != 1 or max(d for _, *dims in heads for d in dims) > 512:
            raise Unfit("keys and values differ in dtype, or a head has more than 512 dims")
        return Layout(tuple(heads), tuple(windows), probe.dtypes.pop())


def _windows(config: Any) -> list[int | None]:
    """The window of each layer's attention, in tokens."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds is None:
        return [window if getattr(config, "use_sliding_window", True) else None] * config.num_hidden_layers
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        raise Unfit(f"it has layers of {', '.join(strange)}")
    return [window if kind == "sliding_attention" else None for kind in kinds]
