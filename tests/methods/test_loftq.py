"""LoftQ: never worse than plain NF4, layer by layer, and singular vectors as good as those of a whole SVD."""

import pytest
import torch

import models
import peftops
from peftops import LoftQConfig
from peftops.attaching import adapted_layers
from peftops.factors.singular import leading
from peftops.methods.loftq import loftq


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
def test_loftq_never_errs_by_more_than_nf4(scaling):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    codes, A, B, errors = loftq(weight, 8, scaling)
    got = (weight - peftops.nf4_dequantize(codes) - scaling * B @ A).norm() / weight.norm()
    assert len(errors) == 6 and all(e <= errors[0] for e in errors[1:])
    assert got.item() == pytest.approx(min(errors[1:]), rel=1e-4)
    model, want = models.mlp(), models.mlp()
    peftops.attach(model, LoftQConfig(r=16))
    x = torch.randn(5, 64)
    plain = peftops.attach(models.mlp(), peftops.QLoRAConfig(double_quant=False))
    assert (model(x) - want(x)).norm() < 0.8 * (plain(x) - want(x)).norm()


def test_no_layer_of_a_model_errs_by_more_than_nf4(capsys):
    dense, model = models.llama().requires_grad_(False), peftops.attach(models.llama(), LoftQConfig(r=8))
    for path, layer in adapted_layers(model):
        layer.requires_grad_(False)
        adapter, weight = layer.adapters["default"], dense.get_submodule(path).weight
        nf4, best = adapter.errors[0], min(adapter.errors[1:])
        print(f"{path:<36} NF4 {nf4:.3%}  LoftQ {best:.3%}")
        plain = peftops.nf4_dequantize(peftops.nf4_quantize(weight, double_quant=False))
        started = peftops.nf4_dequantize(layer.base.weight) + adapter.scaling * adapter.lora_B @ adapter.lora_A
        assert (weight - plain).norm() / weight.norm() == pytest.approx(nf4, rel=1e-5)
        assert (weight - started).norm() / weight.norm() == pytest.approx(best, rel=1e-4)
        assert best < nf4 and f"error {best:.3%} (NF4 {nf4:.3%})" in repr(adapter)
    assert len(capsys.readouterr().out.splitlines()) == 14


def spectrum(kind, m, n, seed=0):
    """A matrix of noise, what quantisation leaves; of falling singular values; of fewer than asked for; of none."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, generator=generator)
    if kind == "rounding":
        return noise - peftops.nf4_dequantize(peftops.nf4_quantize(noise, double_quant=False))
    if kind == "falling":
        u, _, vt = torch.linalg.svd(noise, full_matrices=False)
        return u * 0.7 ** torch.arange(min(m, n)) @ vt
    left, right = torch.randn(m, 3, generator=generator), torch.randn(3, n, generator=generator)
    return {"noise": noise, "rank 3": left @ right, "zero": torch.zeros(m, n)}[kind]


@pytest.mark.parametrize("kind", ["noise", "rounding", "falling", "rank 3", "zero"])
@pytest.mark.parametrize(
    "m, n, r",
    [
        (512, 384, 8),
        (384, 512, 8),
        (448, 448, 16),
        (96, 128, 8),
        (40, 24, 24),
        (7, 1, 1),
    ],
)
def test_the_leading_vectors_leave_what_an_svd_leaves(kind, m, n, r):
    """At most a thousandth more of it, where nothing stands out; and never more than there was."""
    matrix = spectrum(kind, m, n)
    u, s, vt = leading(matrix, r)
    assert u.shape == (m, r) and s.shape == (r,) and vt.shape == (r, n)
    left, values = (matrix - u * s @ vt).norm(), torch.linalg.svdvals(matrix)
    want, size = values[r:].norm(), matrix.norm()
    assert left <= 1.001 * want + 1e-5 * size and left <= size * (1 + 1e-6)
    assert (s[:-1] >= s[1:] * (1 - 1e-4) - 1e-5 * size).all() and (s <= values[:r] * (1 + 1e-5) + 1e-5 * size).all()
    real = s > 1e-3 * size  # without a value there is nothing to be orthogonal
    for vectors in (u.t()[real], vt[real]):
        torch.testing.assert_close(vectors @ vectors.t(), torch.eye(len(vectors)), rtol=0, atol=1e-4)
    again = leading(matrix, r)
    assert all(torch.equal(a, b) for a, b in zip((u, s, vt), again, strict=True))


@pytest.mark.parametrize("exponent", [-100, 60, 110])
def test_the_leading_vectors_are_of_any_magnitude(exponent):
    """Squares of 1e20, and of 1e-25, have no float32."""
    matrix, far = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)), 2.0**exponent
    for got, want in zip(leading(matrix * far, 8), leading(matrix, 8), strict=True):
        assert torch.equal(got, want * far if want.dim() == 1 else want)


@pytest.mark.parametrize("shape", [(512, 384), (384, 512)])
def test_loftq_errs_as_with_whole_svds(shape, monkeypatch):
    """By a ten-thousandth more at most. (The best of rank 8 leaves a fiftieth less than plain NF4.)"""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    ours = loftq(weight, 8, 2.0)[3]

    def whole(matrix, r):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :r], s[:r], vt[:r]

    monkeypatch.setattr("peftops.methods.loftq.leading", whole)
    exact = loftq(weight, 8, 2.0)[3]
    assert ours[0] == exact[0] and min(ours) <= min(exact) * (1 + 3e-4) and min(ours) < 0.99 * ours[0]
