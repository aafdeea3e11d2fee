"""The parts of hard prompts: ids of a context and its continuation, demonstrations, words for classes."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching.config import check_choice, check_range
from .hard_prompt import HardPrompt, Row, joint


def demonstrations(
    rows: Sequence[Row],
    k: int,
    *,
    by: str | None = None,
    like: str | None = None,
    field: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> tuple[Row, ...]:
    """``k`` of ``rows`` to show in a prompt, chosen and ordered by the seed. Both have a large effect on results.

    Args:
        by: a field (the label). Each of its values is shown equally often, with a difference of at most one.
        like: choose the rows whose ``field`` is most similar to this text: it shares the largest part of all
            ``tokenizer`` tokens in either. The most similar row comes last, where it has the largest effect.

    Raises:
        ValueError: there are fewer rows, or a row lacks a field.

    Examples:
        >>> rows = [{"text": text, "label": text} for text in ("good", "bad", "good")]
        >>> sorted(row["label"] for row in peftops.demonstrations(rows, 2, by="label"))
        ['bad', 'good']
    """
    check_range("k", k, 0, len(rows) + 1, whole=True)
    needed = [name for name in (by, field) if name is not None]
    lacking = next((i for i, row in enumerate(rows) if any(name not in row for name in needed)), None)
    if lacking is not None:
        raise ValueError(f"row {lacking} lacks one of {', '.join(needed)}")
    if like is not None:
        if field is None or tokenizer is None:
            raise ValueError("like needs a field to compare with and a tokenizer")
        tokens = lambda text: set(tokenizer(str(text), add_special_tokens=False)["input_ids"])
        wanted = tokens(like)
        near = lambda row: len(wanted & (own := tokens(row[field]))) / max(1, len(wanted | own))
        return tuple(sorted(rows, key=near)[len(rows) - k :])
    order = list(rows)
    random.Random(seed).shuffle(order)
    if by is not None:
        kinds: dict[Any, list[Row]] = defaultdict(list)
        for row in order:
            kinds[row[by]].append(row)
        turns = [
            each
            for turn in range(max(map(len, kinds.values()), default=0))
            for each in [of[turn] for of in kinds.values() if turn < len(of)]
        ]
        order = turns
    return tuple(order[:k])


@dataclass(frozen=True)
class Verbalizer:
    """Words that stand for classes (Schick & Schütze 2021, arXiv:2001.07676).

    A class scores the mean of the log-probabilities of its words' first tokens, under a softmax over the words of all
    classes together.

    Args:
        words: by class. A space is put before each word, because tokens in the middle of a text begin with one. A word
            that starts with ``"<!>"`` gets no space, and the mark is removed.

    Examples:
        >>> words = peftops.Verbalizer({"good": ["great", "fine"], "bad": ["poor"]})
        >>> sorted(words.words)
        ['bad', 'good']
    """

    words: Mapping[str, Sequence[str]]

    def ids(self, tokenizer: Any) -> dict[str, list[int]]:
        """The first token of each word, by class.

        Raises:
            ValueError: a class has no words, or words of two classes begin with the same token.
        """
        found: dict[str, list[int]] = {}
        owner: dict[int, str] = {}
        for name, words in self.words.items():
            spelt = [word[3:] if word.startswith("<!>") else f" {word}" for word in words]
            found[name] = [first[0] for w in spelt if (first := tokenizer(w, add_special_tokens=False)["input_ids"])]
            if not found[name] or len(found[name]) < len(spelt):
                raise ValueError(f"class {name!r} needs words that have tokens, not {list(words)}")
            for token in found[name]:
                if owner.setdefault(token, name) != name:
                    both = f"{owner[token]!r} and {name!r}"
                    raise ValueError(f"words of {both} begin with the same token, {tokenizer.decode([token])!r}")
        return found

    def scores(self, tokenizer: Any, logits: Tensor, *, neutral: Tensor | None = None) -> Tensor:
        """Scores ``[..., classes]`` from the logits ``[..., vocabulary]`` of the position where the word goes.

        Args:
            neutral: logits of the same place for an input without content: probabilities are divided by theirs
                (contextual calibration, Zhao et al. 2021, arXiv:2102.09690).
        """
        of = list(self.ids(tokenizer).values())
        own = lambda at: at[..., [token for ids in of for token in ids]].float().log_softmax(-1)
        chances = own(logits) if neutral is None else (own(logits) - own(neutral)).log_softmax(-1)
        return torch.stack([part.mean(-1) for part in chances.split([len(ids) for ids in of], -1)], -1)

    @torch.no_grad()
    def classify(self, model: nn.Module, tokenizer: Any, prompt: HardPrompt, row: Row, **how: Any) -> str:
        """The class whose words a causal model expects most after the prompt of a row."""
        ids = torch.tensor([prompt.encode(tokenizer, row, target=False).ids], device=model.device)
        best = self.scores(tokenizer, model(input_ids=ids).logits[0, -1], **how).argmax()
        return list(self.words)[int(best)]


@torch.no_grad()
def choice_scores(
    model: nn.Module,
    tokenizer: Any,
    context: str,
    choices: Sequence[str],
    *,
    max_length: int | None = None,
    normalize: str = "none",
) -> list[float]:
    """The log-probability of each of several continuations of ``context`` in a causal model.

    Args:
        max_length: of both in tokens; a longer context loses its start.
        normalize: "none", or "bytes" to divide by the length of the continuation in UTF-8.

    Examples:
        >>> class Letters:  # a tokenizer of transformers does the same
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": [3 + ord(letter) % 60 for letter in text]}
        >>> len(peftops.choice_scores(llama(), Letters(), "a or b:", [" a", " b"]))
        2
    """
    check_choice("normalize", normalize, ("none", "bytes"))
    scores = []
    for choice in choices:
        made = joint(tokenizer, context, choice)
        ids = made.ids if max_length is None else made.ids[-max_length:]
        if not 0 < made.targets < len(ids):
            raise ValueError(f"{choice!r} has {made.targets} tokens, which must be from 1 to {len(ids) - 1}")
        row = torch.tensor([ids], device=model.device)
        chances = model(input_ids=row).logits[0, -made.targets - 1 : -1].float().log_softmax(-1)
        score = chances.gather(1, row[0, -made.targets :, None]).sum().item()
        scores.append(score / len(choice.encode()) if normalize == "bytes" else score)
    return scores
