"""A batch whose rows name adapters of their own: PEFT's adapter_names and multi_lora_linear."""

import pytest
import torch
from torch import nn

import peftops

peft = pytest.importorskip("peft")


def test_mixed_batch_is_that_of_peft():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(96, 64))
    ranks = {"a": 4, "b": 7, "c": 16}
    for name, r in ranks.items():
        config = peft.LoraConfig(r=r, lora_alpha=8, target_modules=["layer"], init_lora_weights=False)
        model = peft.get_peft_model(model, config, name) if name == "a" else (model.add_adapter(name, config), model)[1]
    layer, pool = model.eval().base_model.model.layer, peftops.AdapterPool({"layer": (96, 64)}, pages=16)
    for name in ranks:
        pool.add(name, {"layer": (layer.lora_A[name].weight, layer.lora_B[name].weight)}, layer.scaling[name])
    rows = ["a", None, "b", "c", "b", "a", None, "c"]
    x, base = torch.randn(8, 96), layer.base_layer
    with torch.no_grad(), pool.use(rows) as index:
        want = layer(x, adapter_names=[a or "__base__" for a in rows])
        got = peftops.multi_lora_linear(x, base.weight, pool.layer("layer"), index, base.bias)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert (got - base(x)).abs().amax(1).gt(1e-2).tolist() == [a is not None for a in rows]
