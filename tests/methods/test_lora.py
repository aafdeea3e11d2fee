import json
import math

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import LoRAConfig, QLoRAConfig
from peftops.attaching import adapted_layers
from peftops.attaching.targets import find_targets
from peftops.nn import NF4Linear

q_and_v = ["q_proj", "v_proj"]


def parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def shapes_of_llama(layers, hidden, key_value, inner):
    """The linear layers of a LLaMA, on the meta device: counts need no memory."""
    with torch.device("meta"):
        block = lambda: nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, hidden, bias=False),
                "k_proj": nn.Linear(hidden, key_value, bias=False),
                "v_proj": nn.Linear(hidden, key_value, bias=False),
                "o_proj": nn.Linear(hidden, hidden, bias=False),
                "gate_proj": nn.Linear(hidden, inner, bias=False),
                "up_proj": nn.Linear(hidden, inner, bias=False),
                "down_proj": nn.Linear(inner, hidden, bias=False),
            }
        )
        return nn.ModuleList([block() for _ in range(layers)])


@pytest.mark.parametrize(
    "layers, hidden, key_value, inner, config, count",
    [
        (28, 3072, 1024, 8192, LoRAConfig(r=32, target=q_and_v), 9_175_040),  # Llama-3.2-3B, as PEFT's benchmark has it
        (28, 3072, 1024, 8192, LoRAConfig(r=64, target=q_and_v), 18_350_080),
        (32, 4096, 4096, 11008, LoRAConfig(r=8, target=q_and_v), 4_194_304),  # LLaMA-7B
        (32, 4096, 4096, 11008, LoRAConfig(r=64), 159_907_840),
    ],
)
def test_parameter_counts_of_real_models(layers, hidden, key_value, inner, config, count):
    model = peftops.attach(shapes_of_llama(layers, hidden, key_value, inner), config)
    assert parameters(model) == count == peftops.summary(model).trainable


def test_computes_its_formula():
    linear = nn.Linear(64, 48)
    model = peftops.attach(nn.Sequential(linear), LoRAConfig(r=4, alpha=6.0))
    adapter = model[0].adapters["default"]
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(7, 64)
    weight = linear.weight + 6 / 4 * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, linear.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config, scaling",
    [
        (LoRAConfig(r=8), 2.0),
        (LoRAConfig(r=8, alpha=4.0), 0.5),
        (LoRAConfig(r=16, alpha=8.0, rslora=True), 2.0),
        (LoRAConfig(r=9, rslora=True), 18 / 3),
    ],
)
def test_scaling(config, scaling):
    model = peftops.attach(models.mlp(), config)
    assert model[0].adapters["default"].scaling == pytest.approx(scaling)


@pytest.mark.parametrize(
    "config, name",
    [
        (LoRAConfig(r=64), "lora_A"),
        (peftops.LoRAFAConfig(r=64), "lora_A"),
        (peftops.TiedLoRAConfig(r=64), "tied_A"),
        (peftops.GLoRAConfig(r=64, A="lora", B="lora"), "Xu"),
    ],
)
def test_random_factors_start_as_the_weights_of_a_linear_layer(config, name):
    torch.manual_seed(0)
    model = peftops.attach(nn.Sequential(nn.Linear(400, 300)), config)
    factors = [p for path, p in model[0].adapters["default"].named_parameters() if path.endswith(name) and len(p) == 64]
    bound = 1 / math.sqrt(400)
    for factor in (f for f in factors if f.shape[1] == 400):
        assert factor.abs().max() <= bound and factor.dtype == torch.float32
        assert factor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert factors


def test_initialisation():
    torch.manual_seed(0)
    model = peftops.attach(nn.Sequential(nn.Linear(400, 300)), LoRAConfig(r=64))
    adapter = model[0].adapters["default"]
    assert not adapter.lora_B.any()
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == torch.float32


def test_other_ranks_and_alphas_for_some_layers():
    config = LoRAConfig(r=4, rank_pattern={"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2}, alpha_pattern={"v_proj": 1.0})
    model = peftops.attach(models.llama(), config)
    rank = {name: layer.adapters["default"].lora_A.shape[0] for name, layer in adapted_layers(model)}
    scaling = {name: layer.adapters["default"].scaling for name, layer in adapted_layers(model)}
    assert rank["model.layers.0.self_attn.q_proj"] == 8 and rank["model.layers.0.self_attn.k_proj"] == 4
    assert rank["model.layers.1.mlp.up_proj"] == 2 and rank["model.layers.0.mlp.up_proj"] == 4
    assert scaling["model.layers.0.self_attn.v_proj"] == 0.25 and scaling["model.layers.0.self_attn.q_proj"] == 1.0


def test_dropout_acts_in_training_alone():
    model = peftops.attach(models.mlp(), LoRAConfig(r=8, dropout=0.5))
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.adapters["default"].lora_B)
    x = torch.randn(4, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_target_all_linear_leaves_out_the_head():
    model = models.llama(tied=False)
    found = find_targets(model, "all-linear")
    assert len(found) == 14 and "lm_head" not in found
    assert find_targets(models.mlp(), "all-linear") == ["0", "2"]


def test_target_means_what_it_means_in_peft():
    model = models.llama()
    assert find_targets(model, ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert find_targets(model, ["layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    assert find_targets(model, r".*layers\.0\..*(up|down)_proj") == [
        f"model.layers.0.mlp.{n}_proj" for n in ("up", "down")
    ]
    with pytest.raises(ValueError, match="matches no layer"):
        find_targets(model, "q_proj")  # a string is an expression for the whole name
    assert find_targets(model, ["lm_head"]) == ["lm_head"]


def test_a_target_that_matches_nothing_lists_near_names():
    with pytest.raises(ValueError, match=r"\['q_porj'\] matches no layer of LlamaForCausalLM; did you mean: .*q_proj"):
        peftops.attach(models.llama(), LoRAConfig(target=["q_porj"]))
    with pytest.raises(ValueError, match="its linear layers are: down_proj, gate_proj"):
        peftops.attach(models.llama(), LoRAConfig(target=["xyz"]))
    with pytest.raises(ValueError, match="has no linear layers except its output layer"):
        peftops.attach(nn.Sequential(nn.ReLU()), LoRAConfig())
    with pytest.raises(ValueError, match="is not a regular expression"):
        peftops.attach(models.llama(), LoRAConfig(target="(q_proj"))
    with pytest.raises(
        TypeError,
        match="matches model.norm, a LlamaRMSNorm; only linear, .*experts layers are supported",
    ):
        peftops.attach(models.llama(), LoRAConfig(target=["model.norm"]))


def test_an_error_leaves_the_model_as_it_was():
    model = models.llama()
    before = [type(m) for m in model.modules()]
    for config in (
        LoRAConfig(target=["nothing"]),
        QLoRAConfig(target=["nothing"]),
        QLoRAConfig(target=["norm"]),
    ):
        with pytest.raises((TypeError, ValueError)):
            peftops.attach(model, config)
        assert [type(m) for m in model.modules()] == before
        assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "_peftops")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoRAConfig(r=0), "r must be a whole number from 1, not 0"),
        (lambda: LoRAConfig(r=2.5), "r must be a whole number from 1, not 2.5"),
        (lambda: LoRAConfig(rank_pattern={"q_proj": -1}), "r must be a whole number from 1, not -1"),
        (lambda: LoRAConfig(dropout=1.0), r"dropout must be a number in \[0, 1\), not 1.0"),
        (lambda: LoRAConfig(target=[]), "target must be 'all-linear', names or a regular expression"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls():
    model = models.mlp()
    with pytest.raises(TypeError, match="config must be one of .*LoRAConfig, .*QLoRAConfig.*, not a dict"):
        peftops.attach(model, {"r": 8})
    for name in ("", "a.b", "keys"):
        with pytest.raises(ValueError, match="an adapter's name must be plain, without dots"):
            peftops.attach(model, LoRAConfig(), name=name)
    for call in (peftops.detach, peftops.merge, peftops.unmerge, lambda m: peftops.activate(m, "a")):
        if call is not peftops.unmerge:
            with pytest.raises(ValueError, match="has no adapters; attach one first"):
                call(model)
    peftops.attach(model, LoRAConfig())
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        peftops.attach(model, LoRAConfig())
    with pytest.raises(ValueError, match="has no adapter named 'other'; it has default"):
        peftops.activate(model, "other")
    with pytest.raises(ValueError, match="QLoRA would quantise layers that carry other adapters"):
        peftops.attach(model, QLoRAConfig(), name="q")
    with pytest.raises(ValueError, match=r"detach\(merged=True\) needs a merged adapter"):
        peftops.detach(model, merged=True)
    peftops.merge(model)
    for call in (
        peftops.merge,
        lambda m: peftops.attach(m, LoRAConfig(), name="b"),
        lambda m: peftops.disabled(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="merged"):
            call(model)


def test_training_flags_come_back():
    model = models.mlp()
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    peftops.detach(peftops.attach(model, LoRAConfig()))
    assert [p.requires_grad for p in model.parameters()] == flags


def test_qlora_quantises_all_linear_layers_but_the_head_and_frees_the_dense_ones():
    import gc
    import weakref

    model = models.llama(tied=False)
    dense = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    peftops.attach(model, QLoRAConfig(target=["q_proj"], block_size=128))
    gc.collect()
    assert len(dense) == 14 and all(ref() is None for ref in dense)
    quantized = [m for m in model.modules() if isinstance(m, NF4Linear)]
    assert len(quantized) == 14 and all(m.weight.block_size == 128 and m.weight.double_quant for m in quantized)
    assert type(model.lm_head) is nn.Linear
    assert len(list(adapted_layers(model))) == 2


def test_summary_counts():
    model = peftops.attach(models.llama(tied=False), QLoRAConfig(r=8))
    result = peftops.summary(model)
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert result.layers == 14 and result.adapters == {"default": str(QLoRAConfig(r=8))} and result.active == "default"
    assert result.trainable == 2 * 8 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 96) * 3)
    assert result.dense_bytes == 4 * linears
    assert 4.12 / 8 * linears < result.frozen_bytes < 4.2 / 8 * linears
    assert f"trainable parameters: {result.trainable:,} of {result.total:,}" in str(result)
    assert result.total - result.trainable == sum(p.numel() for p in models.llama(tied=False).parameters())


def test_other_code_can_look_at_the_weight_of_an_adapted_layer():
    layer = peftops.attach(models.mlp(), LoRAConfig())[0]
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (64, 96)


def test_config_for_peft_is_json():
    fields = LoRAConfig(rank_pattern={"q": 2}).to_peft()
    assert json.loads(json.dumps(fields))["lora_alpha"] == 32
    assert LoRAConfig.from_peft({**fields, "target_modules": ["q_proj"]}).r == 16


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(8, 4, max_norm=1.0),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"),
    ],
    ids=str,
)
def test_a_layer_that_is_not_linear_in_its_weight_is_refused(layer):
    """It computes something else than a product: an adapter beside it would not be what it merges to."""
    model = nn.Sequential(layer, nn.Linear(4, 4))
    with pytest.raises(TypeError, match="only linear, embedding, convolution and experts layers are supported"):
        peftops.attach(model, LoRAConfig(r=2, target=["0"]))
    assert type(model[0]) is type(layer)


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Embedding(8, 4, padding_idx=2, scale_grad_by_freq=True), torch.arange(8)),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 6, (1, 3), padding="same", dilation=2), torch.randn(2, 4, 9, 9)),
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2), torch.randn(2, 4, 9)),
        (nn.Conv3d(4, 6, (3, 1, 2), stride=(1, 2, 1)), torch.randn(2, 4, 5, 5, 5)),
    ],
    ids=lambda value: "x" if isinstance(value, torch.Tensor) else str(value),
)
def test_layers_that_are_keep_their_options_when_merged(layer, x):
    model = peftops.attach(nn.Sequential(layer), LoRAConfig(r=2, target=["0"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    want = model(x)
    assert not torch.allclose(want, layer(x))
    peftops.merge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
