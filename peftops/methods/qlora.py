"""QLoRA, Dettmers et al. 2023 (arXiv:2305.14314): LoRA on a base in NF4, or in MXFP4.

    y = dequant(W_nf4) x + b + s B A D(x)

``attach`` quantises the base, one layer after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..attaching import adapted_layers, register
from ..attaching.config import check_choice
from ..attaching.targets import ALL_LINEAR, find_targets, is_within
from ..nn import is_quantized, quantize_linears
from .lora import LoRA, LoRAConfig

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FORMATS = ("nf4", "mxfp4")


@dataclass(frozen=True)
class QLoRAConfig(LoRAConfig):
    """Options of QLoRA: those of :class:`LoRAConfig`, and

    Args:
        block_size: elements of a weight that share one absmax, a power of two from 32 to 4096.
        double_quant: quantise the absmax values, too: 4.127 instead of 4.5 bits per weight.
        format: ``"nf4"``, to which the two options above belong, or ``"mxfp4"``, the format of gpt-oss: 4.25 bits per
            weight, with a larger error (see :func:`peftops.mxfp4_quantize`). Layers that are already in codes keep
            their format.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(64, 32)), peftops.QLoRAConfig(r=2))
        >>> type(model[0].base.weight).__name__
        'NF4Tensor'
    """

    quantizes: ClassVar[bool] = True

    block_size: int = 64
    double_quant: bool = True
    format: str = "nf4"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("block_size", self.block_size, BLOCK_SIZES)
        check_choice("format", self.format, FORMATS)
        if self.format != "nf4" and (self.block_size, self.double_quant) != (64, True):
            raise ValueError(f"block_size and double_quant are options of format 'nf4', not of {self.format!r}")

    @property
    def codes(self) -> dict[str, Any]:
        """The options of :func:`peftops.nn.quantize_linears`."""
        nf4 = {"block_size": self.block_size, "double_quant": self.double_quant}
        return {"format": self.format, **(nf4 if self.format == "nf4" else {})}


def check_nothing_dense_is_adapted(method: str, model: nn.Module) -> None:
    if any(not is_quantized(getattr(layer.base, "weight", None)) for _, layer in adapted_layers(model)):
        raise ValueError(f"{method} would quantise layers that carry other adapters already; attach it before them")


def quantize_base(model: nn.Module, paths: set[str], config: QLoRAConfig) -> None:
    """These layers, without those that train whole."""
    chosen = {path for path in paths if not is_within(path, config.modules_to_save)}
    quantize_linears(model, chosen.__contains__, **config.codes)


@register(QLoRAConfig)
class QLoRA(LoRA):
    @staticmethod
    def prepare(model: nn.Module, config: QLoRAConfig) -> None:
        """Quantise all linear layers but the output layer, experts' too, adapted or not."""
        check_nothing_dense_is_adapted("QLoRA", model)
        chosen = {*find_targets(model, ALL_LINEAR, QLoRA.layers), *find_targets(model, config.target, QLoRA.layers)}
        quantize_base(model, chosen, config)
