"""Prompts: trained vectors that methods put before a model's input, and text, which is not trained.

The files about vectors have their start values, their place in a cache, one prompt for each row of a batch, and images
beside them. The files about text have conversations as token ids, templates with demonstrations, and words for classes.
"""

from .batch import prompt_per_row
from .few_shot import Verbalizer, choice_scores, demonstrations
from .hard_prompt import HardPrompt
from .images import image_prompts

__all__ = ["HardPrompt", "Verbalizer", "choice_scores", "demonstrations", "image_prompts", "prompt_per_row"]
