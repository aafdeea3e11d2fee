"""Attention over keys and values in pages, as servers keep them."""

import torch
from torch import Tensor

_attend = torch.ops.peftops.paged_attention.default
_ALL = 2**62  # a window longer than any sequence


@torch.library.register_fake("peftops::paged_attention")
def _(query, key_pages, value_pages, block_table, lengths, scale, window):
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value_pages.shape[-1])


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention of each sequence's newest tokens to all of its tokens, whose keys and values lie in pages
    (PagedAttention, arXiv:2309.06180).

    Token j of sequence s is in page ``block_table[s, j // page_size]``, at ``j % page_size``. The rows of a query are
    the last ``rows`` tokens of its sequence, whose own keys and values are in the pages already: one row to decode,
    several for a prompt or a piece of it. The bits of a row do not depend on the pieces into which a prompt is cut, on
    the other sequences of the batch, on the places of the pages, or on the number of threads. No page is read beyond a
    sequence's length. A NaN or an infinity among the values of a piece may reach the rows before it. There is no
    gradient: a tensor that requires one raises an error.

    On CUDA nothing waits for the device, so lengths and pages are not checked: those out of range give NaN. Where query
    and pages have one 16-bit dtype, and heads at most 128 dims, tensor cores multiply weights that err by 2^-18.

    Args:
        query: ``[batch, heads, rows, d]``; float32, bfloat16 or float16. A row before its sequence's first token is
            padding, and its result is 0.
        key_pages: ``[pages, kv_heads, page_size, d]`` of any float dtype; dims but the last may have any strides. Each
            head serves ``heads / kv_heads`` query heads, as in grouped-query attention.
        value_pages: ``[pages, kv_heads, page_size, dv]``, of key_pages's dtype.
        block_table: int32 ``[batch, most]``; entries behind a sequence's last page may have any value.
        lengths: int32 ``[batch]``, tokens of each sequence, with those of the query.
        scale: of the scores; ``1 / sqrt(d)`` if None.
        window: a token sees itself and ``window - 1`` before it; None for all.

    Returns:
        ``[batch, heads, rows, dv]`` in query's dtype; heads lie next to each other in memory.

    Raises:
        RuntimeError: shapes or dtypes do not fit together; a length or a page is out of range, on the CPU; a head has
            more than 512 dims; there are more than 2^31 - 1 queries in all heads; the query or the pages require a
            gradient.

    Examples:
        >>> keys, values = torch.randn(2, 8, 2, 4, 16)  # of 8 pages, 2 heads, 4 tokens a page, d = 16
        >>> table = torch.tensor([[5, 0], [3, 0]], dtype=torch.int32)
        >>> lengths = torch.tensor([6, 3], dtype=torch.int32)
        >>> peftops.paged_attention(torch.randn(2, 4, 1, 16), keys, values, table, lengths).shape
        torch.Size([2, 4, 1, 16])
    """
    for name, t in (("query", query), ("key_pages", key_pages), ("value_pages", value_pages)):
        if t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"paged_attention: {name} requires a gradient, but this op has none; call it under torch.no_grad()"
            )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = _ALL if window is None else window
    return _attend(query, key_pages, value_pages, block_table, lengths, scale, window).transpose(1, 2)
