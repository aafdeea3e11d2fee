"""Checkpoints of ``peftops finetune``: the state that a run needs to go on, and the checks of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.files import write_atomically


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Read a checkpoint of a run with this number of steps and the same settings.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, or a setting differs; the sentence says which.
    """
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: no {path}")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    was = state.get("settings") if isinstance(state, dict) else None
    if not isinstance(was, dict):
        raise ValueError(f"{path} is damaged: it has no settings")
    different = [key for key, value in settings.items() if was.get(key) != value]
    if different:
        changes = ", ".join(f"{key}={was.get(key)!r} (now {settings[key]!r})" for key in different)
        raise ValueError(f"{path} was made with other settings: {changes}")
    _check_progress(path, state, steps)
    return state


def check_tensors(path: Path, have: Any, want: dict[str, Tensor]) -> None:
    """Raise unless ``have`` are tensors that can be copied to ``want``."""
    if not isinstance(have, dict) or have.keys() != want.keys():
        raise ValueError(f"{path} does not fit: its adapter has other tensors than this one")
    for name, tensor in want.items():
        _check_like(path, name, have[name], tensor.shape, tensor.dtype)


def check_moments(path: Path, saved: Any, parameters: dict[str, nn.Parameter]) -> dict[int, dict[str, Any]]:
    """Check AdamW's state of the parameters, each by its number. AdamW's kernel does not check shapes, so this does.

    (AdamW8bit checks its own state, in codes.)
    """
    states = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(states, dict) or not all(isinstance(s, dict) for s in states.values()):
        raise ValueError(f"{path} is damaged: it has no state of the optimizer")
    for number, state in states.items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise ValueError(f"{path} does not fit: the optimizer has no parameter {number!r}")
        name, parameter = list(parameters.items())[number]
        if isinstance(state.get("step"), Tensor):  # as torch's own AdamW keeps it
            _check_like(path, f"the step of {name}", state["step"], torch.Size(), torch.float32)
            for moment in ("exp_avg", "exp_avg_sq"):
                _check_like(path, f"{moment} of {name}", state.get(moment), parameter.shape, parameter.dtype)
            if state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(f"{path} does not fit: the optimizer keeps {sorted(map(str, state))} of {name}")
    return states


def _check_progress(path: Path, state: dict[str, Any], steps: int) -> None:
    """Raise unless the counts and records of a checkpoint are valid."""
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    pair = lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(number, value))
    message = lambda value: isinstance(value, dict) and all(isinstance(value.get(k), str) for k in ("role", "content"))
    listed = lambda value, each: isinstance(value, list) and all(map(each, value))
    step = state.get("step")
    right = {
        "step": type(step) is int and 0 <= step <= steps,
        "losses": listed(state.get("losses"), number) and len(state["losses"]) == step,
        "evaluations": listed(state.get("evaluations"), pair),
        "question": listed(state.get("question"), message) and bool(state["question"]),
        "answer_before": isinstance(state.get("answer_before"), str),
        **{key: number(state.get(key)) for key in ("tokens", "seconds", "peak")},
    }
    wrong = [key for key, fine in right.items() if not fine]
    if wrong:
        raise ValueError(f"{path} is damaged: its {', '.join(wrong)} cannot be right")
    try:
        torch.Generator().set_state(state.get("random"))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its random numbers have no state: {error}") from None


def _check_like(path: Path, name: str, have: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(have, Tensor) or have.layout != torch.strided or have.is_meta:
        raise ValueError(f"{path} does not fit: {name} is a {type(have).__name__}")
    if have.shape != shape or have.dtype != dtype:
        raise ValueError(
            f"{path} does not fit: {name} is {have.dtype} {list(have.shape)}, expected {dtype} {list(shape)}"
        )


def digest(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]
