"""Where peftops meets other libraries: their models, their files."""

from .hf import load_model
from .peft_files import load, save
from .summary import Summary, summary

__all__ = ["Summary", "load", "load_model", "save", "summary"]
