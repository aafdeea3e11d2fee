"""Less memory for more time."""

from torch import nn


def compute_again(model: nn.Module) -> None:
    """Make a model of transformers compute the activations of each block again in backward, instead of keeping them.

    It is not reentrant: reentrant checkpointing loses gradients if no input of the first block needs one.
    """
    # Releases of transformers before 5.2x have the second name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
