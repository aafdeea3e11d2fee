"""Zero-init gated attention: attention to a few prompt tokens, under a gate, beside any other attention."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .lora_linear import autocast

_add = torch.ops.peftops.gated_prompt_add.default
_add_ = torch.ops.peftops.gated_prompt_add_.default
_backward = torch.ops.peftops.gated_prompt_backward.default
_backward_ = torch.ops.peftops.gated_prompt_backward_.default


def _rows_like(t: Tensor) -> Tensor:
    return torch.empty_like(t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous())


@torch.library.register_fake("peftops::gated_prompt_add")
def _(out, query, prompt_key, prompt_value, gate, scale):
    return _rows_like(out)


@torch.library.register_fake("peftops::gated_prompt_add_")
def _(out, query, prompt_key, prompt_value, gate, scale):
    return None


@torch.library.register_fake("peftops::gated_prompt_backward")
def _(g, query, prompt_key, prompt_value, gate, scale, need_query):
    dquery = _rows_like(query) if need_query else query.new_empty(0)
    return dquery, *_prompt_gradients(query, prompt_key, prompt_value, gate)


@torch.library.register_fake("peftops::gated_prompt_backward_")
def _(dquery, g, query, prompt_key, prompt_value, gate, scale):
    return _prompt_gradients(query, prompt_key, prompt_value, gate)


def _prompt_gradients(query, prompt_key, prompt_value, gate):
    return (*(t.new_empty(t.shape) for t in (prompt_key, prompt_value)), gate.new_empty(query.shape[1]))


class _AddGatedPrompt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, query, prompt_key, prompt_value, gate, tanh, scale):
        weight = _weight(gate, tanh, query.shape[1])
        ctx.save_for_backward(query, prompt_key, prompt_value, gate)
        ctx.tanh, ctx.scale = tanh, scale
        return _add(out, query, prompt_key, prompt_value, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        query, prompt_key, prompt_value, gate = ctx.saved_tensors
        need_out, need_query, *need_prompt = ctx.needs_input_grad[:5]
        dquery = dkey = dvalue = dgate = None
        if need_query or any(need_prompt):
            weight = _weight(gate, ctx.tanh, query.shape[1])
            dquery, dkey, dvalue, dweight = _backward(g, query, prompt_key, prompt_value, weight, ctx.scale, need_query)
            dgate = _gate_gradient(gate, ctx.tanh, weight, dweight)
        return g if need_out else None, dquery if need_query else None, dkey, dvalue, dgate, None, None


class _Query(torch.autograd.Function):
    """The query on its way into an attention, whose output goes through :class:`_Prompted`.

    Its backward runs last: the attention's gradient of the query exists by then, and the kernel adds the prompt's
    gradient to it. So there is no second tensor of this size, and no pass that adds the two.
    """

    @staticmethod
    def forward(ctx, query, prompt_key, prompt_value, gate, tanh, scale, arrived):
        ctx.save_for_backward(query, prompt_key, prompt_value, gate)
        ctx.tanh, ctx.scale, ctx.arrived = tanh, scale, arrived
        return query.view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx, dquery):
        if not ctx.arrived:  # the loss depends on another result of the attention than its output
            return dquery, None, None, None, None, None, None
        query, prompt_key, prompt_value, gate = ctx.saved_tensors
        weight = _weight(gate, ctx.tanh, query.shape[1])
        if not (dquery.is_contiguous() or dquery.transpose(1, 2).is_contiguous()):
            dquery = dquery.clone(memory_format=torch.contiguous_format)
        g = ctx.arrived.pop()
        dkey, dvalue, dweight = _backward_(dquery, g, query, prompt_key, prompt_value, weight, ctx.scale)
        return dquery, dkey, dvalue, _gate_gradient(gate, ctx.tanh, weight, dweight), None, None, None


class _Prompted(torch.autograd.Function):
    """The attention's output with the prompt's part added. Backward leaves its gradient for :class:`_Query`."""

    @staticmethod
    def forward(ctx, out, prompt, arrived):
        ctx.arrived = arrived
        return _add(out, *prompt)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        ctx.arrived[:] = [g]
        return g, None, None


def _gate_gradient(gate: Tensor, tanh: bool, weight: Tensor, dweight: Tensor) -> Tensor:
    if tanh:
        dweight = dweight * (1 - weight * weight)
    return (dweight.sum() if gate.numel() == 1 else dweight).reshape(gate.shape).to(gate.dtype)


def _weight(gate: Tensor, tanh: bool, heads: int) -> Tensor:
    """The factor of the prompt's part of each head, float32 [heads]."""
    weight = gate.detach().float().reshape(-1)
    return (weight.tanh() if tanh else weight).expand(heads)


def _checked(op: str, gate: Tensor, gate_activation: str, query: Tensor, scale: float | None) -> tuple[bool, float]:
    """Whether the gate is squashed, and the scale of the scores; raises unless the gate fits."""
    if gate_activation not in ("tanh", "none"):
        raise ValueError(f"{op}: gate_activation must be 'tanh' or 'none', not {gate_activation!r}")
    if query.dim() != 4:
        raise ValueError(f"{op}: query must have shape [batch, heads, rows, d], not {list(query.shape)}")
    heads = query.shape[1]
    if gate.numel() not in (1, heads):
        raise ValueError(f"{op}: gate must have 1 element or {heads}, one a head, but its shape is {list(gate.shape)}")
    return gate_activation == "tanh", query.shape[-1] ** -0.5 if scale is None else scale


def add_gated_prompt(
    out: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    gate: Tensor,
    *,
    gate_activation: str = "tanh",
    scale: float | None = None,
) -> Tensor:
    """``out + gate * softmax(scale * query prompt_key^T) prompt_value``: the prompt's part of zero-init gated
    attention (LLaMA-Adapter, arXiv:2303.16199), added to the output of any attention.

    The query is read once, and heads and rows may lie in any order in memory; no ``[rows, tokens]`` matrix exists,
    forward or backward. Prompts are not masked and not rotated. A head whose gate is exactly 0 gets ``out`` bit for
    bit, even if its prompt is not finite. No input is written, not even ``out``, because an attention may keep ``out``
    for its own backward pass. Backward keeps only the inputs other than ``out``. Its result has the same bits for any
    number of threads.

    Args:
        out: the attention output, ``[batch, heads, rows, dv]``; float32, bfloat16 or float16.
        query: as the attention saw it, ``[batch, heads, rows, d]``, of out's dtype.
        prompt_key: ``[kv_heads, tokens, d]`` for the whole batch, or ``[batch, kv_heads, tokens, d]``; of any float
            dtype. Each head serves ``heads / kv_heads`` query heads, as in grouped-query attention.
        prompt_value: ``[kv_heads, tokens, dv]``, or with a batch; of prompt_key's dtype.
        gate: one element for each head, or a single one for all; any shape, any float dtype.
        gate_activation: ``"tanh"``, as LLaMA-Adapter is trained, or ``"none"``, as PEFT has it.
        scale: of the scores; ``1 / sqrt(d)`` if None.

    Returns:
        As ``out``, heads and rows lying in the same order. Differentiable once in all tensors.

    Raises:
        ValueError: the gate has neither one element nor one for each head; gate_activation is unknown.
        RuntimeError: shapes or dtypes do not fit together; a head has more than 1024 dims.

    Examples:
        >>> query = out = torch.randn(1, 4, 6, 8)  # batch, heads, rows, d
        >>> key = value = torch.randn(4, 3, 8)  # three tokens
        >>> torch.equal(peftops.add_gated_prompt(out, query, key, value, torch.zeros(4)), out)
        True
    """
    tanh, scale = _checked("add_gated_prompt", gate, gate_activation, query, scale)
    out, query = autocast(out), autocast(query)
    if torch.is_grad_enabled():
        return _AddGatedPrompt.apply(out, query, prompt_key, prompt_value, gate, tanh, scale)
    return _add(out, query, prompt_key, prompt_value, _weight(gate, tanh, query.shape[1]), scale)


def with_gated_prompt(
    attend: Callable[[Tensor], Tensor],
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    gate: Tensor,
    *,
    gate_activation: str = "tanh",
    scale: float | None = None,
) -> Tensor:
    """``add_gated_prompt(attend(query), query, ...)``, but backward adds the two gradients of the query in place.

    Args:
        attend: an attention of the query ``[batch, heads, rows, d]`` that returns ``[batch, heads, rows, dv]``. If the
            query needs a gradient, ``attend`` must return that gradient as a new tensor, as a product does: the
            prompt's gradient is added to it in place.
        query, prompt_key, prompt_value, gate, gate_activation, scale: see :func:`add_gated_prompt`.

    Returns, raises: as :func:`add_gated_prompt`.

    Examples:
        >>> query, key, value = torch.randn(3, 1, 4, 6, 8)
        >>> prompt = torch.randn(4, 3, 8)
        >>> attend = lambda query: nn.functional.scaled_dot_product_attention(query, key, value)
        >>> peftops.with_gated_prompt(attend, query, prompt, prompt, torch.ones(4)).shape
        torch.Size([1, 4, 6, 8])
    """
    if not torch.is_grad_enabled() or not query.requires_grad or torch.compiler.is_compiling():
        return add_gated_prompt(
            attend(query), query, prompt_key, prompt_value, gate, gate_activation=gate_activation, scale=scale
        )
    tanh, scale = _checked("add_gated_prompt", gate, gate_activation, query, scale)
    query = autocast(query)
    arrived: list[Tensor] = []
    out = attend(_Query.apply(query, prompt_key, prompt_value, gate, tanh, scale, arrived))
    prompt = (query, prompt_key, prompt_value, _weight(gate, tanh, query.shape[1]), scale)
    return _Prompted.apply(autocast(out), prompt, arrived)


def gated_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    gate: Tensor,
    *,
    gate_activation: str = "tanh",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Zero-init gated attention (LLaMA-Adapter, arXiv:2303.16199): attention to words, and under a gate to a prompt.

    Two softmaxes, independent of each other: torch's ``scaled_dot_product_attention`` for ``key`` and ``value``,
    and :func:`add_gated_prompt` for the prompt. With all gates at 0 the result is that of the first softmax, bit for
    bit.

    Args:
        query: ``[batch, heads, rows, d]``; float32, bfloat16 or float16.
        key: ``[batch, kv_heads, keys, d]``, and value: ``[batch, kv_heads, keys, dv]``; fewer heads than query has
            are shared by neighbours (grouped-query attention).
        prompt_key, prompt_value, gate, gate_activation: see :func:`add_gated_prompt`. The prompt is never masked.
        attn_mask, is_causal: see ``scaled_dot_product_attention``.
        scale: of all scores; ``1 / sqrt(d)`` if None.

    Returns:
        ``[batch, heads, rows, dv]`` in query's dtype. Differentiable once in all tensors but the mask.

    Raises:
        ValueError: as :func:`add_gated_prompt`.
        RuntimeError: shapes or dtypes do not fit together.

    Examples:
        >>> query, key, value = torch.randn(3, 1, 4, 6, 8)  # batch 1, 4 heads, 6 rows, d = 8
        >>> prompt = torch.randn(4, 3, 8)
        >>> peftops.gated_prompt_attention(query, key, value, prompt, prompt, torch.ones(4), is_causal=True).shape
        torch.Size([1, 4, 6, 8])
    """
    tanh, prompt_scale = _checked("gated_prompt_attention", gate, gate_activation, query, scale)
    query, key, value = autocast(query), autocast(key), autocast(value)
    grouped = key.dim() > 1 and key.shape[1] != query.shape[1]
    options = dict(attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    prompt = (prompt_key, prompt_value, gate)

    def attend(query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)

    learns = any(t is not None and t.requires_grad for t in (query, key, value, *prompt, attn_mask))
    if torch.is_grad_enabled() and learns:
        return with_gated_prompt(attend, query, *prompt, gate_activation=gate_activation, scale=scale)
    out = attend(query)  # no other code holds it, so the prompt's part is added in place
    _add_(out, query, prompt_key, prompt_value, _weight(gate, tanh, query.shape[1]), prompt_scale)
    return out
