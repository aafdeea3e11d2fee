"""Convolutions and embeddings: HF PEFT and peftops compute the same from each other's files, and merging does, too.

``peft_cases.py`` counts the same over PEFT's own table of models.
"""

import copy

import pytest
import torch
from torch import nn

import peftops

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


class Conv(nn.Module):
    """A convolution, then a linear layer; ``groups`` for both of its layers, as ``size`` dimensions have it."""

    def __init__(self, size, groups=1, bias=True):
        super().__init__()
        torch.manual_seed(0)
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[size]
        self.conv = kind(4, 6, (3, 2, 1)[:size], stride=(2, 1, 1)[:size], padding=1, groups=groups, bias=bias)
        self.norm, self.lin = nn.LayerNorm(6), nn.Linear(6, 5)
        self.x = torch.randn(3, 4, *(7, 5, 4)[:size], generator=torch.Generator().manual_seed(1))

    def forward(self, x):
        return self.lin(self.norm(torch.tanh(self.conv(x)).flatten(2).mean(2)))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin = nn.Embedding(12, 6, padding_idx=2), nn.Linear(6, 5)
        self.x = torch.arange(12).view(3, 4)

    def forward(self, x):
        return self.lin(self.emb(x))


def shake(model):
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


both = ["conv", "lin"]
LORA, DORA = peft.LoraConfig, lambda **options: peft.LoraConfig(use_dora=True, **options)
IN, OUT = dict(feedforward_modules=both), dict(feedforward_modules=[])
CASES = {
    **{f"LoRA {n}d": (lambda n=n: Conv(n), LORA(r=3, target_modules=["conv"]), peftops.LoRAConfig) for n in (1, 2, 3)},
    **{f"DoRA {n}d": (lambda n=n: Conv(n), DORA(r=3, target_modules=both), peftops.DoRAConfig) for n in (1, 2, 3)},
    **{f"biases {n}d": (lambda n=n: Conv(n), LORA(r=3, target_modules=both, lora_bias=True), None) for n in (1, 3)},
    "groups": (lambda: Conv(2, groups=2), LORA(r=4, target_modules=["conv"]), peftops.LoRAConfig),
    "DoRA without a bias": (lambda: Conv(2, bias=False), DORA(r=3, target_modules=["conv"]), peftops.DoRAConfig),
    "DoRA of a table": (Table, DORA(r=3, target_modules=["emb", "lin"]), peftops.DoRAConfig),
    **{f"IA3 {n}d": (lambda n=n: Conv(n), peft.IA3Config(target_modules=both, **OUT), None) for n in (2, 3)},
    **{f"IA3 {n}d reads": (lambda n=n: Conv(n), peft.IA3Config(target_modules=both, **IN), None) for n in (2, 3)},
    "IA3 groups": (lambda: Conv(2, groups=2), peft.IA3Config(target_modules=both, **IN), peftops.IA3Config),
    "tuned": (lambda: Conv(2), peft.LNTuningConfig(target_modules=["lin", "norm"]), peftops.NormTuningConfig),
    "VeLoRA": (Table, LORA(r=3, target_modules=["lin"], velora_config=peft.VeloraConfig(num_groups=2)), None),
}


@pytest.mark.parametrize("build, config, method", CASES.values(), ids=CASES)
def test_files_both_ways_and_merged(tmp_path, build, config, method):
    base, x = build(), build().x
    other = shake(peft.get_peft_model(build(), copy.deepcopy(config)))
    other.save_pretrained(tmp_path / "theirs")
    want = other(x)
    assert (want - base(x)).abs().max() > 1e-2
    model = peftops.load(build(), tmp_path / "theirs").eval()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert method is None or type(model._peftops.configs["default"]) is method
    for m in (model, other):
        m(x).square().sum().backward()
    size = lambda m: sum(p.grad.double().square().sum() for p in m.parameters() if p.requires_grad)
    if not getattr(config, "velora_config", None):  # (whose gradients are others)
        torch.testing.assert_close(size(model), size(other), rtol=1e-3, atol=1e-6)
    peftops.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(x), want, rtol=1e-4, atol=1e-5)
    if getattr(getattr(base, "conv", None), "groups", 1) > 1 and isinstance(config, peft.LoraConfig):
        with pytest.raises(TypeError, match="convolution in groups cannot be merged"):
            peftops.merge(model)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    else:
        peftops.merge(model)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_what_groups_cannot_have_is_refused():
    with pytest.raises(ValueError, match="r is 3; a convolution in 2 groups needs a multiple of 2"):
        peftops.attach(Conv(2, groups=2), peftops.LoRAConfig(r=3, target=["conv"]))
    with pytest.raises(ValueError, match="conv, in groups, has no such sum"):
        peftops.attach(Conv(2, groups=2), peftops.DoRAConfig(r=2, target=["conv"]))


def test_batch_norm_is_not_tuned():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="has no norms"):
        peftops.attach(model, peftops.NormTuningConfig(norms=["1"]))
