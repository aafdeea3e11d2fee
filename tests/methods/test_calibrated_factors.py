"""LoftQ and LQ-LoRA with the moments of their layers' inputs: what a layer computes is never further from the dense
layer's than with the method's own solution."""

import pytest
import torch

import models
import peftops
from peftops import LoftQConfig, LQLoRAConfig
from peftops.attaching import adapted_layers
from peftops.nn import dequantized
from peftops.ops.moments import output_errors

ROWS = [models.tokens(1, 60, seed=i)[0] for i in range(20)]


def rich():
    model = models.llama()
    spread = torch.randn(64, generator=torch.Generator().manual_seed(0))
    model.get_input_embeddings().weight.data *= torch.exp(1.5 * spread)
    return model.requires_grad_(False)


def output_error(layer, dense, moments):
    adapter = layer.adapters["default"]
    made = dequantized(layer.base.weight, torch.float32) + adapter.scaling * adapter.lora_B @ adapter.lora_A
    return output_errors(dense.weight, [made.detach()], moments)[0]


OPTIONS = {
    "loftq": (LoftQConfig, {"r": 4, "iterations": 2, "double_quant": True}),
    "lqlora": (LQLoRAConfig, {"r": 4, "bits": 3.5, "iterations": 2}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_are_never_further_than_with_the_methods_own_solution(name):
    kind, options = OPTIONS[name]
    dense = rich()
    moments = peftops.input_moments(dense, ROWS)
    own, model = (peftops.attach(rich(), kind(**options, moments=m)) for m in (None, moments))
    ratios = []
    for (path, before), (_, after) in zip(adapted_layers(own), adapted_layers(model), strict=True):
        layer, adapter = dense.get_submodule(path), after.adapters["default"]
        was, now = (output_error(host, layer, moments[path]) for host in (before, after))
        assert now <= was * (1 + 1e-5), path
        assert type(before.base.weight) is type(after.base.weight)
        assert min(adapter.output_errors) == pytest.approx(now, rel=1e-3, abs=1e-5)
        ratios.append(now / was)
    assert sum(ratios) / len(ratios) < 0.75
    x = torch.stack(ROWS)
    far = [(m(x).logits - dense(x).logits).norm() for m in (own, model)]
    assert far[1] < 0.8 * far[0]


def test_lqloras_file_holds_the_calibrated_codes(tmp_path):
    moments = peftops.input_moments(rich(), ROWS)
    model = peftops.attach(rich(), LQLoRAConfig(r=4, bits=3.5, iterations=1, moments=moments))
    peftops.save(model, tmp_path)
    again, x = peftops.load(rich(), tmp_path), models.tokens()
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_layer_without_moments_starts_as_ever():
    moments = peftops.input_moments(rich(), ROWS, target=["q_proj"])
    assert len(moments) == 2
    model, own = (peftops.attach(rich(), LoftQConfig(r=4, iterations=1, moments=m)) for m in (moments, None))
    for (path, one), (_, other) in zip(adapted_layers(model), adapted_layers(own), strict=True):
        assert torch.equal(one.base.weight, other.base.weight) != path.endswith("q_proj")
