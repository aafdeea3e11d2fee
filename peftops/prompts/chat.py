"""Conversations as token ids: the output of a chat template, and the part of it that is the assistant's.

An answer ends with the template's end of a turn (Gemma's ``<end_of_turn>``), which may differ from the tokenizer's end
of a text. If a model learnt another end, it would not stop at the end of its turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .time_limit import TookTooLong, time_limit

Message = dict[str, str]
TURNS = ("last", "all")
SECONDS = 10.0  # the most that a template may take for one conversation; some thousandths are usual


def render(tokenizer: Any, messages: Sequence[Message], *, ask: bool) -> str:
    """The text of a conversation, with the beginning of an answer if one is asked for.

    Raises:
        ValueError: the template fails with any error, or takes too long.
    """
    try:
        with time_limit(SECONDS):
            return tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False)
    except TookTooLong:
        raise ValueError(f"the model's chat template takes more than {SECONDS:g} s for one conversation") from None
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the model's chat template cannot render these messages: {why}") from error


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a rendered text: the template has written the special tokens itself."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The ids that ask for an answer to ``messages``."""
    if getattr(tokenizer, "chat_template", None):
        return ids_of(tokenizer, render(tokenizer, messages, ask=True))
    text = "\n".join(m["content"] for m in messages) + "\n"
    return list(tokenizer(text)["input_ids"])


def pieces(tokenizer: Any, messages: Sequence[Message], turns: str = "last") -> list[tuple[list[int], bool]]:
    """A conversation as stretches of ids, each with whether it is to be learnt. Together they are the ids of the
    template's output for all messages.

    Args:
        messages: the last one is the assistant's.
        turns: "last" to learn the last answer, "all" for every one of the assistant's.

    Raises:
        ValueError: the template fails, or its output for a conversation does not begin with its output for the first
            turns.
    """
    last = len(messages) - 1
    answers = [i for i, m in enumerate(messages) if i == last or (turns == "all" and m["role"] == "assistant")]
    made: list[tuple[list[int], bool]] = []
    done = ""
    for i in answers:
        asked = render(tokenizer, messages[:i], ask=True)
        if not asked.startswith(done):
            raise ValueError(
                "the model's chat template renders earlier turns differently when other turns follow, so "
                "only the last answer can be learnt"
            )
        answer = _answer(tokenizer, messages[: i + 1], asked)
        made += [(ids_of(tokenizer, asked[len(done) :]), False), (ids_of(tokenizer, answer), True)]
        done = asked + answer
    if made and _is_bare(tokenizer, messages):
        made[-1] = made[-1][0] + [tokenizer.eos_token_id], True
    return made


def _answer(tokenizer: Any, messages: Sequence[Message], asked: str) -> str:
    """The text of the last message with the end of its turn, as it follows ``asked``."""
    whole = render(tokenizer, messages, ask=False)
    if whole.startswith(asked):
        return whole[len(asked) :]
    # Some templates begin an answer with a text (<think>) that they leave out of a conversation with the answer in it.
    content = messages[-1]["content"].strip()
    at = whole.rfind(content)
    if at < 0:
        raise ValueError("the model's chat template leaves out the answer's text, so the model can learn nothing")
    return whole[at:]


def turn_end(tokenizer: Any) -> str:
    """The template's text after an answer; "" without a template, or if it does not render a plain turn."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    try:
        return render(tokenizer, probe, ask=False).rpartition("answer")[2]
    except ValueError:
        return ""


def stop_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """The tokens that end an answer: the model's own list, the tokenizer's end of a text, and the token that the
    chat template ends a turn with, if that is a special one."""
    own = getattr(generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])} - {None}
    tail = ids_of(tokenizer, turn_end(tokenizer).strip())
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return sorted(found | ({tail[0]} if tail and tail[0] in special else set()))


def _is_bare(tokenizer: Any, messages: Sequence[Message]) -> bool:
    """Whether no visible text ends the last turn. Then the end of the text must end it."""
    content = messages[-1]["content"].strip()
    if tokenizer.eos_token_id is None:
        return False
    if not content:
        return not turn_end(tokenizer).strip()
    return render(tokenizer, messages, ask=False).rstrip().endswith(content)
