"""QA-LoRA on image generators: a small diffusion transformer and a small U-Net learn noise, and are deployed merged."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peftops
from peftops import QALoRAConfig
from peftops.attaching import adapted_layers
from peftops.nn import AdaptedLayer, GroupLinear

WIDTH = 32


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def times(t):
    """A time in [0, 1) as sines and cosines."""
    angle = t[:, None] * 10 ** torch.linspace(0, 3, WIDTH // 2)
    return torch.cat([angle.sin(), angle.cos()], 1)


class Block(nn.Module):
    """Peebles & Xie's, whose norms are shifted and scaled by the time (adaLN)."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x, t):
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(t))[:, None].chunk(6, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        return x + gate2 * self.down(F.gelu(self.up(self.norm(x) * (1 + scale2) + shift2)))


class DiffusionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, image, t):
        x = self.patches(F.unfold(image, 4, stride=4).transpose(1, 2))
        for block in self.blocks:
            x = block(x, times(t))
        return F.fold(self.head(x).transpose(1, 2), 16, 4, stride=4)


class UNet(nn.Module):
    """Convolutions around an attention at the lowest resolution, and a time that all of it knows."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.first, self.last = nn.Conv2d(1, WIDTH, 3, padding=1), nn.Conv2d(2 * WIDTH, 1, 3, padding=1)
        self.down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.attention = Attention()
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2)

    def forward(self, image, t):
        high = F.silu(self.first(image) + self.time(times(t))[..., None, None])
        low = F.silu(self.down(high))
        low = low + self.attention(low.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(low)
        return self.last(torch.cat([high, self.up(low)], 1))


def data(seed):
    """Noisy images of bars, how noisy they are, and the noise."""
    g = torch.Generator().manual_seed(seed)
    bars = torch.zeros(8, 1, 16, 16)
    bars[torch.arange(8), :, torch.randint(16, (8,), generator=g)] = 3.0
    t, noise = torch.rand(8, generator=g), torch.randn(8, 1, 16, 16, generator=g)
    level = t[:, None, None, None]
    return (1 - level) * bars + level * noise, t, noise


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("build, count", [(DiffusionTransformer, 16), (UNet, 6)], ids=["transformer", "u-net"])
def test_it_learns_merges_exactly_and_is_deployed(build, count, bits):
    torch.manual_seed(0)
    model = peftops.attach(build(), QALoRAConfig(r=4, bits=bits, group_size=8))
    assert len(list(adapted_layers(model))) == count
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(30):
        image, t, noise = data(step % 4)
        loss = (model(image, t) - noise).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses[::4]

    image, t, _ = data(9)
    with torch.no_grad():
        want, codes = model(image, t), [copy.deepcopy(layer.base.weight) for _, layer in adapted_layers(model)]
        report = peftops.merge(model)
        assert len(report.layers) == count and not report.quantized and report.rounding < 1e-6 < report.change
        peftops.detach(model, merged=True)
        torch.testing.assert_close(model(image, t), want, rtol=1e-4, atol=1e-4)
        deployed = [layer.weight for layer in model.modules() if isinstance(layer, GroupLinear)]
        assert len(deployed) == count and not any(isinstance(m, AdaptedLayer) for m in model.modules())
        for before, after in zip(codes, deployed, strict=True):
            assert torch.equal(before.packed, after.packed) and torch.equal(before.scales, after.scales)
        fresh = peftops.detach(peftops.attach(build(), QALoRAConfig(r=4, bits=bits, group_size=8)))
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(image, t), model(image, t))
