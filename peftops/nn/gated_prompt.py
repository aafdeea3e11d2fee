"""Zero-init gated attention in transformers' models: an attention module with a prompt beside it.

It works with every model whose attention goes through transformers' registry of attention functions. An attention
function gets queries, keys and values that are normed and rotated. The functions in the registry are wrapped once, and
a call without a prompt passes directly through. When the last user leaves, the original functions are put back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..ops import with_gated_prompt
from ..ops.lora_linear import autocasting

REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # its name in the files of transformers' models
ARGUMENT = "peftops_attention"  # the call's own attention function: modules pass unknown arguments on


def is_attention(module: nn.Module) -> bool:
    """Whether this is an attention module that goes through the registry, and decodes (is causal)."""
    forward = inspect.unwrap(type(module).forward)
    uses = REGISTRY in getattr(getattr(forward, "__code__", None), "co_names", ())
    return uses and getattr(module, "is_causal", True) is True and hasattr(module, "config")


def check_attention(module: nn.Module, name: str) -> None:
    """Raise a sentence unless the attention module ``name`` can take a prompt."""
    if not is_attention(module):
        raise TypeError(f"{name}, a {type(module).__name__}, is not a causal attention of transformers")
    if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values()):
        raise TypeError(f"{name}, a {type(module).__name__}, passes no other arguments on to its attention function")


# By registry and name of each attention function that is replaced: the registry, and the modules that need the
# replacement. (The set is a value here, since torch.compile traces no sets of its own.)
_USERS: dict[tuple[int, str], tuple[Any, WeakSet]] = {}


def open_registry(module: nn.Module, user: nn.Module) -> None:
    """Wrap the attention function that a module uses, so that the argument :data:`ARGUMENT` replaces it; until the user
    leaves."""
    registry = inspect.unwrap(type(module).forward).__globals__[REGISTRY]
    name = module.config._attn_implementation
    if name not in registry:
        raise ValueError(
            f"{type(module).__name__} needs an attention function of transformers' registry, and {name!r} is not in "
            "it; call model.set_attn_implementation('sdpa')"
        )
    if not hasattr(registry[name], ARGUMENT):
        registry[name] = _giving_way(registry[name])
    if not torch.compiler.is_compiling():
        _USERS.setdefault((id(registry), name), (registry, WeakSet()))[1].add(user)


def close_registry(user: nn.Module) -> None:
    """The user leaves: a function that no other user replaces is put back."""
    for key, (registry, users) in list(_USERS.items()):
        users.discard(user)
        if not users:
            del _USERS[key]
            function = registry[key[1]]
            if hasattr(function, ARGUMENT):  # (other code may have put another function there)
                registry[key[1]] = function.__wrapped__


def _giving_way(function: Callable) -> Callable:
    @functools.wraps(function)
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        own = kwargs.pop(ARGUMENT, None)
        return function(module, *args, **kwargs) if own is None else own(function, module, *args, **kwargs)

    setattr(attention, ARGUMENT, True)
    return attention


class Kept:
    """A result that is kept while the tensors from which it was computed are the same, unchanged and frozen."""

    def __init__(self) -> None:
        self._tensors: tuple = ()
        self._versions: list = []
        self._made: Any = None

    def __call__(self, tensors: tuple[Tensor | None, ...], what: Any, make: Callable[[], Any]) -> Any:
        """``make()``, or what it returned for these tensors and this ``what``."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        # (only parameters are changed in place; a tensor of inference mode has no version)
        versions = [what, *(t._version for t in tensors if isinstance(t, nn.Parameter))]
        same = len(tensors) == len(self._tensors) and all(a is b for a, b in zip(tensors, self._tensors, strict=True))
        if not same or self._versions != versions:
            self._made = make()
            self._tensors, self._versions = tensors, versions
        return self._made


class GatedPrompt(nn.Module):
    """A prompt ``[tokens, hidden]`` and a gate per head, or one for all, for one attention module of transformers.

    The module itself computes the prompt's keys and values, unrotated, with the same projections, norms and adapters as
    those of words. They are kept from call to call while no parameter of them trains.
    """

    def __init__(self, attention: nn.Module, tokens: int, gate_activation: str, *, gate_per_head: bool = True):
        super().__init__()
        config, device = attention.config, next(attention.parameters()).device
        self.heads = config.num_attention_heads
        self.prompt = nn.Parameter(torch.randn(tokens, config.hidden_size, device=device))
        self.gate = nn.Parameter(torch.zeros(self.heads if gate_per_head else 1, device=device))
        self.gate_activation = gate_activation
        self._kept = Kept()  # keys and values

    def attend(self, attention: nn.Module, *args: Any, image: Tensor | None = None, **kwargs: Any) -> Any:
        """The result of ``attention(*args, **kwargs)``, with the prompt's part added before the output projection.

        ``image`` ``[batch, 1 or tokens, hidden]`` is added to the prompt of each sample.
        """
        open_registry(attention, self)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        make = lambda: self._project(attention, hidden.dtype, kwargs, image)
        dtypes = hidden.dtype, autocasting(hidden) and torch.get_autocast_dtype(hidden.device.type)
        key, value = self._kept((image, self.prompt, *attention.parameters()), dtypes, make)

        def with_prompt(function: Callable, module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> Any:
            weights = None

            def attend(query: Tensor) -> Tensor:
                nonlocal weights
                out, weights = function(module, query, *rest, **options)
                return out.transpose(1, 2)

            gate = self.gate.expand(self.heads)
            out = with_gated_prompt(
                attend, query, key, value, gate, scale=options.get("scaling"), gate_activation=self.gate_activation
            )
            return out.transpose(1, 2), weights

        return attention(*args, **kwargs, **{ARGUMENT: with_prompt})

    def _project(
        self, attention: nn.Module, dtype: torch.dtype, arguments: dict[str, Any], image: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the module on the prompt, rotated by an angle of 0, up to its attention function."""
        prompt = (self.prompt[None] if image is None else self.prompt + image).to(dtype)
        still = {}
        if arguments.get("position_embeddings") is not None:
            shape = (1, prompt.shape[1], arguments["position_embeddings"][0].shape[-1])
            still["position_embeddings"] = (prompt.new_ones(shape), prompt.new_zeros(shape))
        elif getattr(attention.config, "rope_parameters", None):
            raise TypeError(f"{type(attention).__name__} rotates keys itself, so a prompt's keys cannot stay unrotated")
        found: list[Tensor] = []

        def take(function: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
            found[:] = [key, value]
            return value.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1]), None

        attention(prompt, attention_mask=None, **still, **{ARGUMENT: take})
        key, value = found
        return key.to(value.dtype), value  # (under autocast, rotating keys makes them float32 again)

    def extra_repr(self) -> str:
        tokens, hidden = self.prompt.shape
        return f"tokens={tokens}, hidden={hidden}, gates={len(self.gate)}, gate_activation={self.gate_activation!r}"
