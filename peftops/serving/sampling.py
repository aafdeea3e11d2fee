"""How the next token of a request is drawn, instead of taking the likeliest one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attaching.config import check_range


@dataclass(frozen=True)
class Sampling:
    """Draw each token from the distribution after the options have changed it; they apply in this order.

    A request has its own random numbers, one for each token. The same seed gives the same tokens, with any other
    requests in the batch (if the logits round in the same way).

    Args:
        temperature: logits are divided by it; above 0.
        top_k: keep this number of the likeliest tokens, and those that are as likely as the last of them; None for all.
        top_p: keep the likeliest tokens that together have this share, in (0, 1]; None for all.
        seed: of the request's random numbers; None for a new seed each time.

    Raises:
        ValueError: an option is out of its range.

    Examples:
        >>> peftops.Sampling(temperature=0.7, top_p=0.9, seed=1)
        Sampling(temperature=0.7, top_k=None, top_p=0.9, seed=1)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0)
        if self.temperature == 0:
            raise ValueError("temperature must be above 0; without sampling, the likeliest token is taken")
        if self.top_k is not None:
            check_range("top_k", self.top_k, 1, whole=True)
        if self.top_p is not None:
            check_range("top_p", self.top_p, 0)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        if self.seed is not None:
            check_range("seed", self.seed, 0, 2**63, whole=True)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probability of each token, float64, from the logits ``[vocabulary]``."""
        scores = logits.double()
        scores = (scores - scores.max()) / self.temperature  # the likeliest is 0 for any temperature
        if self.top_k is not None and self.top_k < len(scores):
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[-1], -torch.inf)
        p = scores.softmax(-1)
        if self.top_p is not None:
            likeliest, order = p.sort(descending=True, stable=True)
            before = likeliest.cumsum(-1) - likeliest  # a token is kept if those before it do not reach the share
            p = p.index_fill(-1, order[before >= self.top_p], 0.0)
        return p / p.sum()

    def drawer(self) -> Callable[[Tensor], int]:
        """A function that draws the tokens of one request, each from its logits ``[vocabulary]``."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)

        def draw(logits: Tensor) -> int:
            heights = self.probabilities(logits).cumsum(-1)
            # below the sum, so never beyond the last token that has a share
            point = torch.rand((), dtype=torch.float64, generator=generator, device="cpu") * heights[-1].cpu()
            return int(torch.searchsorted(heights, point.to(heights.device), right=True))

        return draw
