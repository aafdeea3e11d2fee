"""Every option of every method is of the kind that it is declared to be: numbers that are none do not pass."""

import dataclasses
import math
import sys

import pytest

import peftops
from examples import example_of
from peftops.attaching import METHODS
from peftops.attaching.config import check_range

NEVER = (10**400, -(10**400), math.nan, math.inf, -math.inf, {"q": 10**400}, [math.nan], {"q": math.nan}, object(), 1j)
KINDS = {"bool": (0, 1, None, "false"), "int": (1.5, True, None, "4", 2**63), "float": (True, None, "0.5"), "str": (3,)}
OPTIONS = [(config, option.name) for config in METHODS for option in dataclasses.fields(config)]


@pytest.mark.parametrize("config, name", OPTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_of_another_kind_is_refused_by_name(config, name):
    options = example_of(config).config
    kind = next(option.type for option in dataclasses.fields(config) if option.name == name)
    for value in (*NEVER, *KINDS.get(kind, ())):
        with pytest.raises(ValueError, match=rf"\b({name}|r|alpha|target)\b"):
            dataclasses.replace(options, **{name: value})


@pytest.mark.parametrize("config", [config for config, name in OPTIONS if name == "target"])
@pytest.mark.parametrize("target", ["", [], [""], ("q_proj", "")], ids=repr)
def test_a_target_has_names(config, target):
    with pytest.raises(ValueError, match="target"):
        dataclasses.replace(example_of(config).config, target=target)


@pytest.mark.parametrize("config", METHODS)
def test_what_a_file_makes_of_options_is_of_their_kinds(config):
    """JSON has lists alone, and whole numbers where there is no fraction."""
    options = example_of(config).config
    for option in dataclasses.fields(config):
        value = getattr(options, option.name)
        if isinstance(value, tuple):
            dataclasses.replace(options, **{option.name: list(value)})
        if option.type == "float" and value == int(value):
            dataclasses.replace(options, **{option.name: int(value)})


def test_olora_needs_no_iterations_of_an_svd():
    with pytest.raises(ValueError, match="iterations=4, but OLoRA needs no SVD"):
        peftops.OLoRAConfig(iterations=4)


NEEDED = [
    (peftops.LoRAConfig, "r"),
    (peftops.LoRAConfig, "lora_alpha"),
    (peftops.LoRAConfig, "target_modules"),
    (peftops.PiSSAConfig, "r"),
    (peftops.IA3Config, "target_modules"),
    (peftops.IA3Config, "feedforward_modules"),
    (peftops.VeRAConfig, "r"),
    (peftops.PromptTuningConfig, "num_virtual_tokens"),
    (peftops.PrefixTuningConfig, "num_virtual_tokens"),
]


@pytest.mark.parametrize("config, key", NEEDED, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("null", [True, False], ids=["null", "missing"])
def test_what_a_file_must_say_is_not_guessed(config, key, null):
    fields = {"target_modules": ["q_proj"], **example_of(config).config.to_peft()}
    config.from_peft(fields)
    wrong = {**fields, key: None} if null else {name: value for name, value in fields.items() if name != key}
    with pytest.raises(ValueError, match=f"adapter_config.json lacks {key}$"):
        config.from_peft(wrong)


@pytest.mark.parametrize("whole, most, beyond", [(True, 2**63 - 1, 2**63), (False, sys.float_info.max, 10**400)])
def test_numbers_end_where_64_bits_do(whole, most, beyond):
    check_range("r", most, 1, whole=whole)
    with pytest.raises(ValueError, match="r must be a"):
        check_range("r", beyond, 1, whole=whole)
