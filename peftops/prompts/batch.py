"""Mixed-task batches, as in Lester et al. 2021 (arXiv:2104.08691, figure 2): each row of a batch with its own soft
prompt, on one frozen model.

    row i: model([E_i; X_i])    a shorter prompt is filled up, behind it, to the length of the longest

The filling is masked, and positions go on from the prompt's own end: each row computes as it would alone.
Gradients reach the prompts of a batch's rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching import attachment, hosts
from ..nn import Prompt, Prompted
from ..nn.prompt import cached, check_one_sequence
from .soft import SoftPrompt, without_front

_NAME = "prompt-of-each-row"


@contextlib.contextmanager
def prompt_per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside ``with prompt_per_row(model, ["a", "b", None]):`` the rows of a batch have these prompts, in this order.

    Args:
        model: a decoder or an encoder; each name is one of its attached :class:`PromptTuningConfig` adapters.
        names: one for each row; None for the base model. (``generate`` repeats rows for beams: in a batch with ``n``
            times the rows, each name counts for ``n`` rows.)

    Raises:
        ValueError: there are no names, or one is not attached.
        TypeError: an adapter is not of prompt tuning, the model is an encoder-decoder, or a name is None and the
            model's pooler reads the first position, at which a row without a prompt has no token.

    Examples:
        >>> model = llama()
        >>> for name in ("a", "b"):
        ...     _ = peftops.attach(model, peftops.PromptTuningConfig(tokens=2), name=name)
        >>> with peftops.prompt_per_row(model, ["a", None]):  # for the two rows of ids
        ...     y = model(ids).logits
    """
    state = attachment(model)
    missing = [name for name in names if name is not None and name not in state.configs]
    if missing or not names:
        raise ValueError(f"the model has no adapter named {missing[0]!r}" if missing else "names must not be empty")
    hosting = [(path, host) for path, host in hosts(model) if set(names) & set(host.adapters)]
    prompts: dict[str, Prompt] = {}
    for _, host in hosting:
        for name in set(names) & set(host.adapters):
            prompts[name] = host.adapters[name]
            if not isinstance(host.adapters[name], SoftPrompt) or len(hosting) > 1:
                kind = type(host.adapters[name]).__name__
                raise TypeError(f"prompt_per_row needs prompts of PromptTuning on one body, and {name!r} is {kind}")
    if prompts and None in names and getattr(model.get_submodule(hosting[0][0]), "pooler", None) is not None:
        raise TypeError(f"the pooler of {type(model).__name__} reads the first position: every row needs a prompt")
    active = state.switch.active
    if not prompts:
        state.switch.active = None
    else:
        path, host = hosting[0]
        for name, prompt in prompts.items():  # several train at once, also those that were not active
            resting = state.resting.pop(name, ())
            for leaf, parameter in prompt.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or f"{path}.{leaf}" in resting)
        Prompted.put(model, path, _NAME, PromptBatch([prompts.get(name) for name in names]), state.switch)
        state.switch.active = _NAME
    try:
        yield model
    finally:
        state.switch.active = active
        if prompts:
            del host.adapters[_NAME]


class PromptBatch(Prompt):
    """A prompt, or none, for each row. The prompts are adapters of the model, and no submodules of this."""

    def __init__(self, prompts: Sequence[SoftPrompt | None]):
        super().__init__()
        self._prompts = list(prompts)  # in a list, a module does not register them
        self._lengths = [0 if p is None else len(p.prompt) for p in prompts]
        self._longest, self._new = max(self._lengths), False

    def before(self, body: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        check_one_sequence(arguments)
        given = next(t for key in ("input_ids", "inputs_embeds") if (t := arguments.get(key)) is not None)
        (rows, tokens), device, many = given.shape[:2], given.device, self._longest
        if rows % len(self._prompts):
            raise ValueError(f"a batch of {rows} rows, but {len(self._prompts)} names of prompts")
        times, past = rows // len(self._prompts), cached(arguments)
        prompts = [prompt for prompt in self._prompts for _ in range(times)]
        lengths = torch.tensor(self._lengths, device=device).repeat_interleave(times)[:, None]
        self._new, changed = not past, dict(arguments)

        mask = arguments.get("attention_mask")
        if mask is None:
            mask = torch.ones(rows, tokens + max(0, past - many), dtype=torch.long, device=device)
        if mask.dim() != 2:
            raise ValueError("a prompt needs an attention_mask of shape [batch, tokens], or none")
        front = (torch.arange(many, device=device) < lengths).to(mask.dtype)
        changed["attention_mask"] = torch.cat([front, mask], 1)

        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens, device=device) + max(0, past - many)
        positions = positions.expand(rows, tokens) + lengths
        if past:
            return {**changed, "position_ids": positions}
        places = torch.arange(many, device=device).expand(rows, many)
        changed["position_ids"] = torch.cat([places, positions], 1)
        types = arguments.get("token_type_ids")
        if types is not None:
            changed["token_type_ids"] = torch.cat([types.new_zeros(rows, many), types], 1)
        ids = changed.pop("input_ids", None)
        embeds = body.get_input_embeddings()(ids) if arguments.get("inputs_embeds") is None else given
        changed["inputs_embeds"] = torch.cat([self._rows(prompts, embeds), embeds], 1)
        return changed

    def _rows(self, prompts: list[SoftPrompt | None], embeds: Tensor) -> Tensor:
        """``[rows, longest, hidden]``, each prompt at the beginning of its row."""
        empty = embeds.new_zeros(self._longest, embeds.shape[2])
        own = [empty if p is None else torch.cat([p.prompt.to(embeds.dtype), empty[len(p.prompt) :]]) for p in prompts]
        return torch.stack(own)

    def after(self, body: nn.Module, output: Any) -> Any:
        return without_front(output, self._longest) if self._new else output
