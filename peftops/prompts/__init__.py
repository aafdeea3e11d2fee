"""Prompts: vectors that methods put before a model's input, and text that nothing trains.

Vectors: where they start from, how they meet a cache, one for each row of a batch, images beside them. Text:
conversations as token ids, templates with demonstrations, words for classes.
"""

from .batch import prompt_per_row
from .few_shot import Verbalizer, choice_scores, demonstrations
from .hard_prompt import HardPrompt
from .images import image_prompts

__all__ = ["HardPrompt", "Verbalizer", "choice_scores", "demonstrations", "image_prompts", "prompt_per_row"]
