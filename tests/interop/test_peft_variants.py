"""HF PEFT's variants of LoRA on layers in codes: merging is the variant's own, or refused as PEFT refuses it."""

import pytest
import torch
from torch import nn

import peftops
from peftops.nn import quantize_linears

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_linears(model, lambda name: True)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], lora_alpha=4, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("side", ["a", "b"])
def test_block_diagonal_factors_merge_as_they_compute(side):
    blocks = {f"target_modules_bd_{side}": ["0"]}
    model = adapted(use_bdlora=peft.tuners.lora.BdLoraConfig(nblocks=2, **blocks))
    layer, eye = model.base_model.model[0], torch.eye(64)
    before, bias = layer.base_layer.weight, layer.base_layer.bias
    with torch.no_grad():
        want = (model(eye) - bias).T
    model.merge_adapter()
    got = peftops.nf4_dequantize(layer.base_layer.weight)
    assert (got - want).norm() < 0.12 * want.norm() < 0.12 * 2 * (want - peftops.nf4_dequantize(before)).norm()
    model.unmerge_adapter()
    assert layer.base_layer.weight is before


def test_an_adapter_that_depends_on_the_tokens_is_not_merged():
    model = adapted(alora_invocation_tokens=[1], task_type=None)
    before = model.base_model.model[0].base_layer.weight
    with pytest.raises(NotImplementedError, match="does not support"):
        model.merge_adapter()
    assert model.base_model.model[0].base_layer.weight is before


def test_a_bias_that_is_not_finite_is_not_merged():
    model = adapted(lora_bias=True)
    layer = model.base_model.model[0]
    nn.init.constant_(layer.lora_B["default"].bias, float("nan"))
    before = layer.base_layer.bias
    with pytest.raises(ValueError, match="would give weights that are not finite"):
        model.merge_adapter()
    assert layer.base_layer.bias is before and before.isfinite().all()
