"""QA-LoRA: what it quantises, and that it merges into the zeros alone."""

import pytest
import torch

import models
import peftops
from examples import VECTORS
from peftops import QALoRAConfig
from peftops.attaching import adapted_layers
from peftops.nn import GroupLinear


@pytest.mark.parametrize("pool", ["sum", "mean", "peft"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_merging_changes_the_zeros_alone(bits, pool):
    model = peftops.attach(models.mlp(), QALoRAConfig(r=4, bits=bits, pool=pool))
    torch.manual_seed(1)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.adapters["default"].lora_B)
    want, before = model(VECTORS), [layer.base.weight for _, layer in adapted_layers(model)]
    report = peftops.merge(model)
    assert report.change > 0.01 and report.rounding < 1e-6 and not report.quantized
    for old, (_, layer) in zip(before, adapted_layers(model), strict=True):
        assert isinstance(layer.base, GroupLinear)
        assert torch.equal(old.packed, layer.weight.packed) and torch.equal(old.scales, layer.weight.scales)
        assert not torch.equal(old.zeros, layer.weight.zeros)
    torch.testing.assert_close(model(VECTORS), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"r": 0}, "r must be a whole number from 1"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, None, not 5"),
        ({"group_size": 12}, "group_size must be one of 8,"),
        ({"pool": "max"}, "pool must be one of 'sum'"),
    ],
)
def test_wrong_options_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        QALoRAConfig(**options)


def test_inputs_that_are_no_groups_get_a_sentence():
    with pytest.raises(ValueError, match="0 has 64 inputs, which is not a multiple of group_size=128"):
        peftops.attach(models.mlp(), QALoRAConfig(group_size=128))
