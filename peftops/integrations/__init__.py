"""Where peftops meets other libraries: their models, their files."""

from . import registration as registration
from .bitsandbytes_models import from_bitsandbytes
from .calibration import CalibrationConfig, CalibrationReport, input_moments, quantize_model
from .combining import combine
from .gguf_adapter import save_gguf
from .hf import load_model
from .peft_files import load, save
from .summary import Summary, summary

__all__ = [
    "CalibrationConfig",
    "CalibrationReport",
    "Summary",
    "combine",
    "from_bitsandbytes",
    "input_moments",
    "load",
    "load_model",
    "quantize_model",
    "save",
    "save_gguf",
    "summary",
]


def __getattr__(name: str) -> object:
    if name in ("GroupConfig", "MXFP4Config", "NF4Config"):  # these import transformers, and the others do without
        from . import quantizer

        return getattr(quantizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
