"""Where peftops meets other libraries: their models, their files."""

from .calibration import CalibrationConfig, CalibrationReport, input_moments, quantize_model
from .hf import load_model
from .peft_files import load, save
from .summary import Summary, summary

__all__ = [
    "CalibrationConfig", "CalibrationReport", "Summary", "input_moments", "load", "load_model",
    "quantize_model", "save", "summary",
]  # fmt: skip
