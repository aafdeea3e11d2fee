"""Layers that adapters would do nothing on: their weights are read without calling them."""

import copy
import warnings

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import BottleneckConfig, LoRAConfig, NormTuningConfig, QLoRAConfig
from peftops.attaching.targets import read_without_calls


class Net(nn.Module):
    """A layer of torch's that reads its layers' weights itself, between two that are called."""

    def __init__(self, inside):
        super().__init__()
        self.first, self.inside, self.last = nn.Linear(32, 32), inside, nn.Linear(32, 32)

    def forward(self, x):
        x = self.first(x)
        x = self.inside(x, x, x)[0] if isinstance(self.inside, nn.MultiheadAttention) else self.inside(x)
        return self.last(x)


def attention():
    torch.manual_seed(0)
    return Net(nn.MultiheadAttention(32, 4, batch_first=True))


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return Net(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def wavlm():
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(0)
    return WavLMModel(
        WavLMConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=(16,),
            conv_kernel=(3,),
            conv_stride=(2,),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=1,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=0.0,
        )
    )


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, state_size=4, num_hidden_layers=2))


VECTORS = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
CASES = {
    attention: (VECTORS, "inside.out_proj", "inside.out_proj"),
    encoder: (VECTORS, "inside.layers.1.linear1", "inside.layers.0.norm1"),
    wavlm: (torch.randn(2, 400, generator=torch.Generator().manual_seed(0)), "encoder.layers.0.attention.q_proj", ""),
    mamba: (models.tokens(), "backbone.layers.0.mixer.dt_proj", ""),
}
builds = pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)


def output(model, build):
    y = model(CASES[build][0])
    return y if isinstance(y, torch.Tensor) else y[0]


@builds
@pytest.mark.parametrize("config", [LoRAConfig(r=4), QLoRAConfig(r=4)], ids=["lora", "qlora"])
def test_all_linear_means_layers_that_are_called(build, config):
    """In eval mode as in training, each adapter is in what comes out, and merging changes nothing."""
    model = peftops.attach(build(), config)
    assert not read_without_calls(model) & {name for name, _ in peftops.attaching.adapted_layers(model)}
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(model.train(), build).sum().backward()
    model.eval()
    want = output(model, build)
    for path, host in peftops.attaching.adapted_layers(model):
        kept = host.adapters["default"].lora_B.detach().clone()
        with torch.no_grad():
            host.adapters["default"].lora_B.zero_()
            assert not torch.equal(output(model, build), want), path
            host.adapters["default"].lora_B.copy_(kept)
    peftops.merge(model, dense=True)
    torch.testing.assert_close(output(model, build), want, rtol=1e-3, atol=1e-4)


@builds
def test_by_its_name_such_a_layer_is_refused(build):
    _, name, norm = CASES[build]
    model = build()
    before = copy.deepcopy(model.state_dict())
    for config in (
        LoRAConfig(r=4, target=[name]),
        LoRAConfig(r=4, modules_to_save=[name]),
        LoRAConfig(r=4, target=f".*{name}"),
        *([NormTuningConfig([norm])] if norm else []),
    ):
        with pytest.raises(TypeError, match="whose weights [A-Za-z]+ reads without a call"):
            peftops.attach(model, config)
    assert not hasattr(model, "_peftops") and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_of_such_layers_alone():
    with pytest.raises(ValueError, match="no linear layers except its output layer and layers that are never called"):
        peftops.attach(encoder().inside, LoRAConfig(r=4))
    with pytest.raises(TypeError, match="not a transformer block with linear layers"):
        peftops.attach(encoder().inside, BottleneckConfig())


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.bert, models.t5, models.gemma, models.vit])
def test_models_that_call_all_their_layers(build):
    linear = [name for name, kind in read_without_calls_and_kinds(build()) if kind]
    assert linear == []


def read_without_calls_and_kinds(model):
    return [(name, isinstance(model.get_submodule(name), nn.Linear)) for name in read_without_calls(model)]


class Partial(nn.Module):
    """It calls one of its layers only if it is told to."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.often = nn.Linear(8, 8), nn.Linear(8, 8), False

    def forward(self, x):
        return self.unused(self.used(x)) if self.often else self.used(x)


def test_the_first_backward_tells_what_got_no_gradient():
    model, x = peftops.attach(Partial(), LoRAConfig(r=2, target=["used", "unused"])), torch.ones(1, 8)
    with pytest.warns(UserWarning, match=r"gave no gradient to unused.lora_A, unused.lora_B: .*do not learn"):
        model(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()  # once is enough
        peftops.attach(model, LoRAConfig(r=2, target=["used"]), name="other")
        model(x).sum().backward()
    peftops.activate(model, "default")
    peftops.attach(model, LoRAConfig(r=2, target=["used", "unused"]), name="third")
    with pytest.warns(UserWarning, match="no gradient to unused"):  # each adapter for itself
        model(x).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_do_not_look_like_layers_without_a_gradient(reentrant):
    model = peftops.attach(models.llama(), LoRAConfig(r=2)).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=models.tokens(), labels=models.tokens()).loss.backward()


class Router(nn.Linear):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.softmax(-1)


class Rounds(nn.Linear):
    def forward(self, x):
        return super().forward(x.round())


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.factor = 0.5

    def forward(self, x):
        return self.factor * super().forward(x)


class Written(nn.Linear):
    """What nn.Linear computes, in other words, as in Falcon."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Pads(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))


class Standardizes(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize("kind", [Router, Rounds, Scaled])
def test_a_subclass_that_computes_something_else_is_no_linear_layer(kind):
    """An adapter computes by the weight alone, and would leave out what the subclass does."""
    model = nn.Sequential(nn.Linear(32, 32), kind(32, 32))
    assert [type(layer).__name__ for layer in peftops.attach(copy.deepcopy(model), LoRAConfig(r=2))][1] == kind.__name__
    quantized = peftops.attach(copy.deepcopy(model), QLoRAConfig(r=2))
    assert torch.equal(quantized[1].weight, model[1].weight) and not quantized[1].weight.requires_grad
    with pytest.raises(TypeError, match=f"matches 1, a {kind.__name__}; only linear"):
        peftops.attach(model, LoRAConfig(r=2, target=["1"]))
    with pytest.raises(ValueError, match=rf"no linear layers except .* \({kind.__name__} compute otherwise than"):
        peftops.attach(nn.Sequential(kind(32, 32)), LoRAConfig(r=2))


@pytest.mark.parametrize("kind", [Pads, Standardizes])
def test_nor_is_a_convolution_that_does(kind):
    with pytest.raises(TypeError, match=f"matches 0, a {kind.__name__}; only linear, embedding, convolution and "):
        peftops.attach(nn.Sequential(kind(3, 4, 3)), LoRAConfig(r=2, target=["0"]))


@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_writes_the_same_in_other_words_is_one(bias):
    torch.manual_seed(0)
    model = nn.Sequential(Written(32, 16, bias), nn.ReLU(), Written(16, 8, bias))
    x = torch.randn(3, 32)
    want = model(x)
    adapted = peftops.attach(copy.deepcopy(model), LoRAConfig(r=2))
    assert torch.equal(adapted(x), want)
    nn.init.normal_(adapted[0].adapters["default"].lora_B)
    trained = adapted(x)
    if bias:
        assert torch.equal(torch.compile(adapted, fullgraph=True, backend="aot_eager")(x), trained)
    peftops.merge(adapted)
    torch.testing.assert_close(peftops.detach(adapted, merged=True)(x), trained)
