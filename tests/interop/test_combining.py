"""``peftops.combine`` and HF PEFT's ``add_weighted_adapter``: the same adapters give the same sum."""

import copy
import re

import pytest
import torch
from torch import nn

import models
import peftops
from peftops.attaching import adapted_layers
from peftops.integrations.combining import HOW

peft = pytest.importorskip("peft")
from peft.tuners.lora import model as pefts  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PATH = "base_model.model."
WEIGHTS = [0.7, -0.4, 1.3]
NAMES = ["a", "b", "c"]


class Net(nn.Module):
    """A layer of each kind that is a matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv, self.lin = nn.Embedding(9, 6), nn.Conv2d(6, 8, (3, 2)), nn.Linear(8, 5)

    def forward(self, x):
        return self.lin(self.conv(self.emb(x).mT.unflatten(2, (3, 3))).flatten(2).mT)


x = torch.arange(18).view(2, 9) % 9


def theirs(ranks=(3, 3, 3), target=("lin", "conv", "emb"), quiet=(), **options):
    """A model of PEFT's with three random adapters, the second of which has other options."""
    model = None
    for i, (name, r) in enumerate(zip(NAMES, ranks, strict=True)):
        layers = [layer for layer in target if (i, layer) not in quiet]
        config = peft.LoraConfig(r=r, lora_alpha=4 + i, target_modules=layers, **options)
        if model is None:
            model = peft.get_peft_model(Net(), config, name)
        else:
            model.add_adapter(name, config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def ours(other, folder):
    other.save_pretrained(folder)
    model = Net()
    for name in NAMES:
        peftops.load(model, folder / name, name=name)
    return model.eval()


def assert_combines(other, folder, monkeypatch, how, **options):
    """The last thing that PEFT does before it draws anything is to freeze the new adapter."""
    freeze = pefts._freeze_adapter
    monkeypatch.setattr(pefts, "_freeze_adapter", lambda *given: (freeze(*given), torch.manual_seed(5)))
    model = ours(other, folder)
    renamed = {"rank": "svd_rank", "signs": "majority_sign_method"}
    other.add_weighted_adapter(
        NAMES, WEIGHTS, "sum", combination_type=how, **{renamed.get(key, key): value for key, value in options.items()}
    )
    other.set_adapter("sum")
    torch.manual_seed(5)
    peftops.combine(model, NAMES, WEIGHTS, how=how, name="sum", **options)
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)
    assert (model(x) - Net()(x)).abs().max() > 1e-2
    return model


SPARSE = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("how", ["cat", "svd", "linear", *SPARSE, *(f"{how}_svd" for how in SPARSE)])
def test_it_is_what_peft_makes(tmp_path, monkeypatch, how):
    sparse = {"density": 0.6} if how.removesuffix("_svd") in SPARSE else {}
    # (PEFT draws for a table's change as it lies in memory.)
    target = ("lin", "conv") if "dare" in how and "svd" in how else ("lin", "conv", "emb")
    model = assert_combines(theirs(target=target), tmp_path, monkeypatch, how, **sparse)
    peftops.save(model, tmp_path / "sum")
    torch.testing.assert_close(peftops.load(Net(), tmp_path / "sum").eval()(x), model(x))
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "sum").eval()
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how, options", [("ties", dict(density=0.5, signs="frequency")), ("svd", dict(rank=2))])
def test_options_mean_the_same(tmp_path, monkeypatch, how, options):
    assert_combines(theirs(), tmp_path, monkeypatch, how, **options)


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_ranks_and_layers_that_differ(tmp_path, monkeypatch, how):
    model = assert_combines(theirs((2, 3, 4), quiet={(0, "emb"), (1, "conv")}), tmp_path, monkeypatch, how)
    ranks = {path: layer.adapters["sum"].rank for path, layer in adapted_layers(model)}
    assert ranks == ({"lin": 9, "conv": 6, "emb": 7} if how == "cat" else dict.fromkeys(("lin", "conv", "emb"), 4))
    peftops.save(model, tmp_path / "sum")
    torch.testing.assert_close(peftops.load(Net(), tmp_path / "sum").eval()(x), model(x))


def test_cat_is_several_active_adapters(tmp_path):
    other = theirs((2, 3, 4), use_rslora=True)
    model = ours(other, tmp_path)
    other.base_model.set_adapter(NAMES[:2])
    with pytest.raises(TypeError, match=r"activate takes the name of one adapter, not \['a', 'b'\]; peftops.combine"):
        peftops.activate(model, NAMES[:2])
    peftops.combine(model, NAMES[:2], [1, 1], how="cat")
    torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_of_a_base_in_codes_and_of_experts(how):
    from moe_models import moe

    for model in (models.llama(), moe("Qwen3Moe")):
        for name in ("a", "b"):
            peftops.attach(model, peftops.QLoRAConfig(r=2), name=name)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.2)
        ids = models.tokens(vocabulary=64)
        alone = copy.deepcopy(model)
        peftops.activate(alone, "a")
        peftops.combine(model, ["a", "b"], [1, 0], how=how, name="sum")
        torch.testing.assert_close(model(ids).logits, alone(ids).logits, rtol=1e-3, atol=1e-4)
        assert type(model._peftops.configs["sum"]) is peftops.QLoRAConfig


def test_pissa_counts_as_what_it_adds():
    model = models.llama()
    peftops.attach(model, peftops.LoRAConfig(r=2), name="a")
    peftops.attach(model, peftops.PiSSAConfig(r=2), name="b")
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    want = model(models.tokens()).logits
    peftops.combine(model, ["b", "a"], [1, 0], how="svd")
    torch.testing.assert_close(model(models.tokens()).logits, want, rtol=1e-3, atol=1e-4)
    assert type(model._peftops.configs["combined"]) is peftops.LoRAConfig


@pytest.mark.parametrize(
    "config, message",
    [
        (peftops.DoRAConfig(r=2), "of DoRAConfig, is not a product of two factors"),
        (peftops.VeRAConfig(r=2), "of VeRAConfig, is not a product of two factors"),
        (peftops.PromptTuningConfig(tokens=2), "of PromptTuningConfig, is not a product"),
        (peftops.LoRAConfig(r=2, lora_bias=True), "has lora_bias=True, and a weighted sum does not support"),
        (peftops.LoRAConfig(r=2, modules_to_save=["lm_head"]), r"has modules_to_save=\['lm_head'\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_methods_without_a_sum_are_refused_by_name(config, message):
    model = peftops.attach(
        peftops.attach(models.llama(tied=False), peftops.LoRAConfig(r=2), name="a"), config, name="b"
    )
    with pytest.raises(ValueError, match=message):
        peftops.combine(model, ["a", "b"], [1, 1])
    assert list(model._peftops.configs) == ["a", "b"] and peftops.summary(model).active == "b"


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(adapters=["a", "x"]), "no adapter named 'x'; it has a, b"),
        (dict(adapters=["a", "a"]), "adapters must be a list of different names"),
        (dict(adapters="ab"), "adapters must be a list of different names"),
        (dict(weights=[1.0]), r"weights must be a number for each of \['a', 'b'\]"),
        (dict(weights=None), r"weights must be a number for each of \['a', 'b'\], not None"),
        (dict(weights="12"), "weights must be a number for each"),
        (dict(weights=[1, True]), "the weight of 'b' must be a number in .*, not True"),
        (dict(weights=[1.0, float("nan")]), "the weight of 'b' must be a number in .*, not nan"),
        (dict(weights=[1, 10**400]), "the weight of 'b' must be a number in"),
        (dict(adapters=None), "adapters must be a list of different names, not None"),
        (dict(adapters=iter("ab")), "adapters must be a list of different names"),
        (dict(adapters=[["a"], ["b"]]), r"the model has no adapter named \['a'\]; it has a, b"),
        (dict(adapters=["a", 1]), "the model has no adapter named 1"),
        (dict(how="ties", density=True), "needs density"),
        (dict(how="mean"), "how must be one of 'cat', 'svd', 'linear'"),
        (dict(how="linear"), "0: how='linear' takes the sums of A and of B, whose ranks differ here"),
        (dict(how="ties"), r"how='ties' needs density, the share of elements that is kept, in \(0, 1\], not None"),
        (dict(how="ties", density=1.5), "needs density"),
        (dict(how="cat", density=0.5), "density=0.5 is for kinds that leave elements out"),
        (dict(how="cat", rank=2), "rank=2 is for svd"),
        (dict(how="svd", rank=0), "rank must be a whole number from 1"),
        (dict(how="dare_linear", density=0.5, signs="frequency"), "signs='frequency' is for ties"),
        (dict(name="a"), "already has an adapter named 'a'"),
    ],
    ids=lambda value: re.sub(" at 0x.*", "", str(value))[:80],  # the same in every process
)
def test_what_means_nothing_is_refused(given, message):
    model = peftops.attach(models.mlp(), peftops.LoRAConfig(r=2, target=["0"]), name="a")
    peftops.attach(model, peftops.LoRAConfig(r=3, target=["0"]), name="b")
    with pytest.raises(ValueError, match=message):
        peftops.combine(model, **{"adapters": ["a", "b"], "weights": [1.0, 0.5]} | given)
    assert list(model._peftops.configs) == ["a", "b"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "bad, message",
    [
        (float("nan"), "'b', of LoRAConfig, is not finite in 0"),
        (float("inf"), "'b', of LoRAConfig, is not finite in 0"),
        (3e38, "0: .* beyond float32"),
    ],
    ids=str,
)
def test_numbers_without_a_sum_are_refused_and_nothing_is_attached(how, bad, message):
    model = peftops.attach(nn.Sequential(nn.Linear(8, 6)), peftops.LoRAConfig(r=2), name="a")
    peftops.attach(model, peftops.LoRAConfig(r=2), name="b")
    torch.manual_seed(0)
    with torch.no_grad():
        for adapter in model[0].adapters.values():
            adapter.lora_A.fill_(1.0)
            adapter.lora_B.fill_(1.0)
        model[0].adapters["b"].lora_A[1, 2] = bad
    options = {} if how in ("cat", "svd", "linear") else {"density": 1.0}
    with pytest.raises(ValueError, match=message):
        peftops.combine(model, ["a", "b"], [1.0, 4.0], how=how, **options)
    assert list(model._peftops.configs) == ["a", "b"] == list(model[0].adapters)


@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_a_model_without_numbers_has_sums_without_numbers(how):
    model = peftops.attach(nn.Sequential(nn.Linear(8, 6, device="meta")), peftops.LoRAConfig(r=2), name="a")
    peftops.combine(model, ["a"], [1.0], how=how)
    assert all(p.is_meta for p in model.parameters())


def test_groups_have_no_cat():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    for name in ("a", "b"):
        peftops.attach(model, peftops.LoRAConfig(r=2, target=["0"]), name=name)
    for how in ("cat", "svd"):
        with pytest.raises(TypeError, match="0: .*groups"):
            peftops.combine(model, ["a", "b"], [1, 1], how=how)
    peftops.combine(model, ["a", "b"], [1, 1], how="linear")
