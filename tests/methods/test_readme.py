"""The README's table of methods says what the methods do: which there are, what merges, and whose files they have."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import peftops
from examples import example_of
from peftops.attaching import METHODS

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
OF_PEFT = {"LORA", "VERA", "GLORA", "IA3", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"}


def claims():
    """(config, merges, file) of each config in the table; a cell of several parts has one for each of its row."""
    found = []
    for line in README.split("## Methods")[1].split("\n\n")[1].splitlines()[2:]:
        _, config, _, merges, file = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"`(\w+Config)`", config)
        files = file.split("; ") if len(names) > 1 and ";" in file else [file] * len(names)
        assert len(files) == len(names), line
        found += [(name, merges, own) for name, own in zip(names, files, strict=True)]
    return found


CONFIGS = {config.__name__: config for config in METHODS}
each = pytest.mark.parametrize("name, merges, file", claims(), ids=[name for name, *_ in claims()])


def adapted(name, **options):
    example = example_of(CONFIGS[name])
    model = peftops.attach(example.build(), dataclasses.replace(example.config, **options))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_every_method_has_its_place():
    assert sorted(name for name, *_ in claims()) == sorted(CONFIGS)


@each
def test_what_merges(name, merges, file):
    model = adapted(name)
    if merges.startswith("no"):
        with pytest.raises(TypeError, match="cannot be merged"):
            peftops.merge(model)
        return
    assert merges.startswith(("yes", "with a report", "exactly")), merges
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = peftops.merge(model)
    assert report.quantized == merges.startswith("with a report") and report.change > 0
    assert report.quantized or report.rounding < 1e-6


@each
def test_whose_files(name, merges, file, tmp_path):
    peftops.save(adapted(name), tmp_path)
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    assert (kind in OF_PEFT) == file.startswith("PEFT's") and file.startswith(("PEFT's", "own")), (kind, file)
    for option, value in re.findall(r"PEFT's with `(\w+)=\"(\w+)\"`", file):
        peftops.save(adapted(name, **{option: value}), tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] in OF_PEFT


def test_these_types_are_pefts():
    peft = pytest.importorskip("peft")
    assert OF_PEFT <= {kind.value for kind in peft.PeftType}
    own = {config.peft_type for config in METHODS} - OF_PEFT
    assert not own & {kind.value for kind in peft.PeftType}
