"""Image prompts of LLaMA-Adapter (arXiv:2303.16199, section 3.4): a sample's image adds a vector to its prompts.

    P_l + I    for each layer l, with I = W [f_1; f_2; ...] + b    f_i the image's features at scale i

W and b are one projection for all layers. Features are vectors of any frozen encoder. With one for each row of a
prompt, each row gets its own I, as in V2's code (arXiv:2304.15010).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching import attachment, hosts
from ..nn import PREFIX, Prompt
from ..nn.gated_prompt import Kept

ARGUMENT = "peftops_image"  # layers pass unknown arguments on, and get them again when they are recomputed


@contextlib.contextmanager
def image_prompts(model: nn.Module, features: Tensor | Sequence[Tensor]) -> Iterator[nn.Module]:
    """Inside ``with image_prompts(model, features):`` the rows of a batch have these images, in this order; outside of
    it they have none. A backward pass may come later. If it computes blocks again, checkpointing must not be
    re-entrant, because the blocks share the projection.

    Args:
        model: whose active adapter is :class:`LLaMAAdapterConfig` with ``image_features=D``.
        features: ``[rows, D]``, or ``[rows, tokens, D]`` with one for each row of the prompts, of any float dtype;
            or several scales of such, together ``D`` wide. They are copied, and gradients reach them. ``generate``
            repeats rows for beams: with a cache, in a batch with ``n`` times the rows, each image counts for ``n``
            rows.

    Raises:
        ValueError: the active adapter reads no images, or features of another shape; a call inside has another number
            of rows.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LLaMAAdapterConfig(tokens=3, layers=1, image_features=5))
        >>> with peftops.image_prompts(model, torch.randn(2, 5)):  # an image for each row of ids
        ...     y = model(ids).logits
    """
    name = attachment(model).switch.active
    own = [host.adapters[name] for _, host in hosts(model) if name in host.adapters]
    images = next((adapter for adapter in own if isinstance(adapter, ImagePrompts)), None)
    if images is None:
        raise ValueError(
            f"image_prompts: the active adapter, {name!r}, reads no images; attach a "
            "LLaMAAdapterConfig(image_features=...) and activate it"
        )
    before, images.features = images.features, images.checked(features)
    try:
        yield model
    finally:
        images.features = before


class ImagePrompts(Prompt):
    """The projection. It stands before the body, and passes the projected features on to the layers.

    Args:
        features: their width.
        prompt: the parameter ``[tokens, hidden]`` of one of the layers.

    Raises:
        TypeError: the model is an encoder-decoder.
    """

    def __init__(self, model: nn.Module, features: int, prompt: Tensor):
        super().__init__()
        if getattr(model.config, "is_encoder_decoder", False):
            raise TypeError(f"image_features needs a decoder, not a {type(model).__name__}")
        (tokens, hidden), device = prompt.shape, prompt.device
        self.tokens = tokens
        self.projection = nn.Linear(features, hidden, device=device, dtype=torch.float32)
        self.features: Tensor | None = None  # of the images, while there are some
        self._kept = Kept()

    def stored(self) -> dict[str, Tensor]:
        return dict(self.projection.named_parameters())

    def file_key(self, name: str, layer: str) -> str:
        return f"{PREFIX}image_projection.{name}"

    def given_to(self, attention: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
        """The image's value, taken out of a layer's arguments."""
        image = arguments.pop(ARGUMENT, None)
        if image is None and self.features is not None:
            raise TypeError(
                f"the model does not pass on to its {type(attention).__name__} the argument of image_prompts"
            )
        return image

    def checked(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """All scales as one new tensor of the projection's dtype and device."""
        scales = [features] if isinstance(features, Tensor) else list(features)
        width, shapes = self.projection.in_features, [list(t.shape) for t in scales]
        leading = {tuple(shape[:-1]) for shape in shapes}
        middle = [] if len(next(iter(leading), ())) < 2 else [self.tokens]
        rows = shapes[0][0] if shapes and shapes[0] else 0
        if leading != {(rows, *middle)} or not rows or sum(shape[-1] for shape in shapes) != width:
            raise ValueError(
                f"image_prompts: features must have shape [rows, {width}] or [rows, {self.tokens}, {width}], or be "
                f"parts of that along its last dimension, not {', '.join(map(str, shapes)) or 'nothing'}"
            )
        return torch.cat([t.to(self.projection.weight) for t in scales], -1)

    def before(self, body: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.features is None:
            return arguments
        rows = next(len(t) for key in ("input_ids", "inputs_embeds") if (t := arguments.get(key)) is not None)
        times, rest = divmod(rows, len(self.features))
        if rest or (times != 1 and arguments.get("cache") is None):
            raise ValueError(f"image_prompts: a batch of {rows} rows, but features of {len(self.features)} images")
        # The same tensor for each generated token, so that layers can keep what they compute from it.
        make = lambda: self._project(times)
        return {**arguments, ARGUMENT: self._kept((self.features, *self.projection.parameters()), times, make)}

    def _project(self, times: int) -> Tensor:
        """``[batch, 1 or tokens, hidden]``."""
        image = self.projection(self.features).repeat_interleave(times, 0)
        return image if image.dim() == 3 else image[:, None]
