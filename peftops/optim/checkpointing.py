"""Less memory for more time."""

from torch import nn


def compute_again(model: nn.Module) -> None:
    """Have a model of transformers compute the activations of each block again in backward, and keep none.

    Without reentrance, since that loses gradients where no input of the first block needs one.
    """
    # Releases of transformers before 5.2x have the second name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
