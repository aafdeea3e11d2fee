"""How many of HF PEFT's own tests of LoRA pass if the linear layers of its models are NF4Linear.

    python tests/interop/peft_suite_cases.py FOLDER-OF-PEFT'S-TESTS [OPTIONS OF PYTEST]

The folder is ``tests`` of PEFT's source distribution, as for ``peft_cases.py``. Its models of linear layers are
quantised when they are made, so its tests run our fused operator, our merging and our copies of layers. A failed test
has a line with its reason; the last line is the figure.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from unittest import mock

import pytest
import their_tests

from peftops.nn import quantize_linears

MODELS = ("MLP", "MLP2", "MLPWithGRU", "MLP_LayerNorm", "DeepMLP", "MLP_2x_same_shape")

OTHERS = (
    "ia3 glora adalora loha lokr oft hra miss boft lntuning vera pvera randlora vblora fourierft monteclora gralora"
)
REFUSED = {  # a part of the sentence
    "couldn't connect": "a model of the Hub",
    "out of codes": "refused: a start or a method that needs the numbers of the base",
    "codes cannot have one; freeze it": "refused: modules_to_save would train a weight in codes",
    "does not work on an NF4Tensor": "refused: target_parameters adds to the numbers of a weight in codes",
}


def in_codes(model: type) -> None:
    """Quantise the linear layers of each model of a class, as soon as it is made."""
    made = model.__init__

    @functools.wraps(made)
    def __init__(self, *args, **kwargs):
        made(self, *args, **kwargs)
        quantize_linears(self, lambda name: True)

    model.__init__ = __init__


def choose(item: pytest.Item) -> str | bool | None:
    """LoRA on models of linear layers."""
    import peft

    given = getattr(item, "callspec", None)
    values = list(given.params.values()) if given else []
    methods = {value if isinstance(value, type) else type(value) for value in values}
    methods = {kind for kind in methods if issubclass(kind, peft.PeftConfig)}
    if methods - {peft.LoraConfig} or any(f"_{name}_" in item.name for name in OTHERS.split()):
        return "another method than LoRA"
    if given and given.params.get("model_id", "MLP") not in MODELS:
        return "a model without an adapter on a linear layer"
    return None


def differs(name: str, sentence: str) -> str | None:
    """Why a test fails that we do not want to pass."""
    if "when_base_layer_has_no_bias" in name or "test_repr_lora_linear" in name:
        return "the text has the name of our layer, where theirs expect Linear"
    for part, reason in REFUSED.items():
        if part in sentence:
            return reason
    if "merg" in name and sentence.startswith(("AssertionError", "assert ")):
        return "merging quantises the weight again, and theirs allow an error of 1e-4"
    return None


def main() -> None:
    sys.path.insert(0, f"{sys.argv[1]}/..")
    for name in ("diffusers", "parameterized"):  # which other tests of PEFT's need
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = mock.MagicMock()
    theirs = importlib.import_module("tests.test_custom_models")
    for name in MODELS:
        in_codes(getattr(theirs, name))
    their_tests.run(sys.argv[1], {"test_custom_models.py": choose}, differs, sys.argv[2:])


if __name__ == "__main__":
    main()
