"""The configurations that transformers writes into ``config.json``: the format of a model's codes, and the layout of
its files."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..attaching.config import check_choice
from ..methods.qlora import BLOCK_SIZES
from ..ops import group_quantize, mxfp4_quantize, nf4_quantize
from .awq_files import to_awq
from .bitsandbytes_files import to_bitsandbytes
from .code_files import Layout
from .gptq_files import FORMAT, to_gptq
from .mxfp4_files import to_mxfp4

GROUP_SIZES = tuple(2**i for i in range(3, 13))


class CodesConfig(QuantizationConfigMixin):
    """The base of the configurations: the layers that stay dense, and the layout of files."""

    quant_method: str
    layouts: ClassVar[tuple[str, ...]]
    stored_dims: ClassVar[int] = 2  # of the weights that another library's layout has codes of

    def _set(self, skip: Any, layout: str, quant_method: str | None, **own: Any) -> None:
        if isinstance(skip, str) or not all(isinstance(name, str) for name in skip or ()):
            raise ValueError(f"skip must be a list of layers' names or of their ends, not {skip!r}")
        check_choice("layout", layout, self.layouts)
        if quant_method not in (None, self.quant_method):
            raise ValueError(f"a {type(self).__name__} is of quant_method {self.quant_method!r}, not {quant_method!r}")
        vars(self).update(own, skip=sorted(skip or ()), layout=layout)

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``config.json`` for it; in another library's layout, that library's entry."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return self._as_of_layout() if self.layout != "peftops" else {"quant_method": self.quant_method, **own}

    def _as_of_layout(self) -> dict[str, Any]:
        raise NotImplementedError

    def file_layout(self) -> Layout:
        """The layout with which the files of a model in codes are read."""
        return Layout(self.layout)

    def quantize(self, dense: Tensor) -> Tensor:
        raise NotImplementedError

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight in another library's layout, by the part of their names after the layer's name."""
        raise NotImplementedError


@register_quantization_config("peftops_nf4")
class NF4Config(CodesConfig):
    """For ``from_pretrained(..., quantization_config=NF4Config())``: linear layers become 4-bit while they are read.

    Args:
        block_size: elements of a weight that share one absmax, a power of two from 32 to 4096.
        double_quant: quantise the absmax values, too: 4.127 instead of 4.5 bits per weight.
        skip: names, or ends of names, of layers that stay dense. The output layer, and layers that are not called,
            always stay dense.
        layout: how ``save_pretrained`` writes the model: "peftops", or "bitsandbytes" in that library's own files,
            which can be read with it and without peftops.

    Raises:
        ValueError: an option is not one of those.
    """

    quant_method = "peftops_nf4"
    layouts = ("peftops", "bitsandbytes")

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        skip: Any = None,
        layout: str = "peftops",
        quant_method: str | None = None,
    ):
        check_choice("block_size", block_size, BLOCK_SIZES)
        check_choice("double_quant", double_quant, (True, False))
        self._set(skip, layout, quant_method, block_size=block_size, double_quant=double_quant)

    def quantize(self, dense: Tensor) -> Tensor:
        return nf4_quantize(dense, block_size=self.block_size, double_quant=self.double_quant)

    def _as_of_layout(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": vars(self).get("_dtype", "float32"),
            "llm_int8_skip_modules": vars(self).get("_dense", self.skip),
        }

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        return {f".{name}": part for name, part in to_bitsandbytes(weight).items()}


@register_quantization_config("peftops_group")
class GroupConfig(CodesConfig):
    """The same for groups of codes with a scale and a zero each, see :func:`peftops.group_quantize`.

    Args:
        bits, group_size, symmetric, clip: as there.
        skip: as of :class:`NF4Config`.
        layout: "peftops", or "gptq": GPTQ's tensors with scales and zeros in float32, so that nothing is lost, which
            ``load_model`` reads; or "awq": AWQ's own tensors, for a model that was read from such files, code for code.
        checkpoint_format: of files that are read in layout "gptq": "gptq", or "gptq_v2".

    Raises:
        ValueError: an option is not one of those.
    """

    quant_method = "peftops_group"
    layouts = ("peftops", "gptq", "awq")

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        symmetric: bool = False,
        clip: str = "none",
        skip: Any = None,
        layout: str = "peftops",
        checkpoint_format: str = FORMAT,
        quant_method: str | None = None,
    ):
        check_choice("bits", bits, (2, 3, 4, 8))
        check_choice("group_size", group_size, GROUP_SIZES)
        check_choice("symmetric", symmetric, (True, False))
        check_choice("clip", clip, ("none", "mse"))
        if layout == "awq" and bits != 4:
            raise ValueError(f"layout='awq' has codes of 4 bits, not {bits}")
        self._set(
            skip,
            layout,
            quant_method,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            clip=clip,
            checkpoint_format=checkpoint_format,
        )

    def file_layout(self) -> Layout:
        return Layout(self.layout, self.bits, self.checkpoint_format)

    def quantize(self, dense: Tensor) -> Tensor:
        how = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric", "clip")}
        return group_quantize(dense, **how)

    def _as_of_layout(self) -> dict[str, Any]:
        if self.layout == "awq":
            dense = vars(self).get("_dense", self.skip)
            how = {"bits": 4, "group_size": self.group_size, "zero_point": True, "version": "gemm"}
            return {"quant_method": "awq", **how, "modules_to_not_convert": dense or None}
        return {
            "quant_method": "gptq",
            "checkpoint_format": FORMAT,
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": self.symmetric,
            "zeros": "float32",
        }

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        parts = to_awq(weight) if self.layout == "awq" else to_gptq(weight)
        return {f".{name}": part for name, part in parts.items()}


@register_quantization_config("peftops_mxfp4")
class MXFP4Config(CodesConfig):
    """The same for MXFP4, see :func:`peftops.mxfp4_quantize`. Files of gpt-oss, which has it, are read code for code.

    Args:
        skip: as of :class:`NF4Config`.
        layout: "peftops", or "mxfp4": transformers' own tensors of experts, which it reads without peftops. That layout
            has no other layers in MXFP4.

    Raises:
        ValueError: an option is not one of those.
    """

    quant_method = "peftops_mxfp4"
    layouts = ("peftops", "mxfp4")
    stored_dims = 3

    def __init__(self, skip: Any = None, layout: str = "peftops", quant_method: str | None = None):
        self._set(skip, layout, quant_method)

    def quantize(self, dense: Tensor) -> Tensor:
        return mxfp4_quantize(dense)

    def _as_of_layout(self) -> dict[str, Any]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": vars(self).get("_dense", self.skip)}

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        return to_mxfp4(weight)
