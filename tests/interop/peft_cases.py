"""How many of the adapters that HF PEFT's own tests save are loaded, and compute the same.

    python tests/interop/peft_cases.py FOLDER-OF-PEFT'S-TESTS

The folder is ``tests`` of PEFT's source distribution (``pip download --no-binary :all: --no-deps peft``); its
``test_custom_models.py`` has a table of models and options. All rows of methods that peftops has are saved by PEFT with
random numbers in what trains, and loaded here. The last line is the figure; a refused row has its sentence.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import tempfile
import warnings
from unittest import mock

import torch
from torch import nn

import peftops

METHODS = ("LoraConfig", "IA3Config", "LNTuningConfig", "VeraConfig", "GloraConfig")


def outcome(model: nn.Module, config: object, inputs: dict) -> str:
    """ "" if the adapter is loaded and computes the same; or the sentence that refuses it."""
    import peft

    other = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    for parameter in other.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    other.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        other.save_pretrained(folder)
        want = other(**inputs)
        try:
            got = peftops.load(copy.deepcopy(model), folder).eval()(**inputs)
        except (ValueError, TypeError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"
        assert not torch.allclose(want, model(**inputs), atol=1e-6), "this row changes nothing"
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return ""


def main() -> None:
    warnings.filterwarnings("ignore")
    sys.path.insert(0, f"{sys.argv[1]}/..")
    for name in ("diffusers", "parameterized"):  # which other tests of PEFT's need
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = mock.MagicMock()
    theirs = importlib.import_module("tests.test_custom_models")
    loaded = total = 0
    for name, kind, config_class, options in theirs.TEST_CASES:
        if config_class.__name__ not in METHODS:
            continue
        torch.manual_seed(0)
        model = theirs.MockTransformerWrapper.from_pretrained(kind).eval()
        tests = theirs.TestPeftCustomModel()
        said = outcome(model, config_class(**options), tests.prepare_inputs_for_testing())
        total, loaded = total + 1, loaded + (not said)
        print(f"{name}: {said or 'loads'}", flush=True)
    print(f"{loaded} of {total}")


if __name__ == "__main__":
    main()
