"""Commands on a mixture of experts: right, or refused by name."""

import json
import warnings

import pytest
import torch

import models
import peftops
from moe_models import moe
from peftops.cli import main
from peftops.integrations.calibration import quantize_model
from peftops.planner import estimate, skeleton

ids = models.tokens(vocabulary=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rows, and two adapters: one of all layers, one of attention."""
    folder = tmp_path_factory.mktemp("moe")
    moe("Mixtral", vocab_size=320, max_position_embeddings=256).save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"repeat {c}", "response": c * 6} for c in "abcdefgh"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "requests.jsonl").write_text(json.dumps({"prompt": "abc", "adapter": "attention"}) + "\n")
    common = ["finetune", "--model", "model", "--train", "rows.jsonl", "--method", "qlora", "--steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*common, "--out", "all"]) == 0
        assert main([*common, "--target", "q_proj,o_proj", "--out", "attention"]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_what_is_merged_computes_the_same(tmp_path):
    assert main(["merge", "--model", "model", "--adapter", "all", "--out", str(tmp_path / "merged")]) == 0
    merged = peftops.load_model(tmp_path / "merged", quantize=False)
    adapted = peftops.load(peftops.load_model("model"), "all")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-4)
    assert any(name.endswith("experts.gate_up_proj") for name, _ in merged.named_parameters())


def test_requests_of_adapters_of_other_layers_are_served(tmp_path, capsys):
    serve = ["serve", "--model", "model", "--requests", "requests.jsonl", "--max-tokens", "2"]
    assert main([*serve, "--adapters", "attention", "--out", str(tmp_path / "answers")]) == 0
    assert main([*serve, "--adapters", "attention", "all", "--out", str(tmp_path / "more")]) == 2
    assert "adapts model.layers.0.mlp.experts; a pool holds A and B of linear layers" in capsys.readouterr().err


def test_what_does_not_know_experts_says_so(tmp_path, capsys):
    ask = ["influence", "--model", "model", "--adapter", "all", "--train", "rows.jsonl", "--prompt", "a"]
    assert main([*ask, "--completion", "b"]) == 2
    assert "experts.gate_up_proj has QLoRA's of experts" in capsys.readouterr().err
    assert main(["quantize", "--model", "model", "--calibrate", "rows.jsonl", "--out", str(tmp_path / "q")]) == 2
    assert "is a mixture of experts, and model.layers.0.mlp.experts would stay dense" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"MixtralForCausalLM is a mixture of experts"):
        quantize_model(moe("Mixtral"), [[1, 2, 3]])
    model = peftops.attach(moe("Mixtral"), peftops.QALoRAConfig(r=2, target=["down_proj", "o_proj"]))
    peftops.merge(model)
    from peftops.cli.export import write_packed

    with pytest.raises(TypeError, match="is of experts, of which GPTQ's layout has no codes"):
        write_packed(peftops.detach(model, merged=True), models.tokenizer(), tmp_path / "packed")


def test_a_plan_counts_experts():
    model = skeleton("model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense, codes = (estimate(model, c, batch=1, length=8) for c in (peftops.LoRAConfig(), peftops.QLoRAConfig()))
        assert estimate(model, peftops.DoRAConfig(r=2), batch=1, length=8).weights > 0.9 * dense.weights
    attached = peftops.attach(peftops.load_model("model"), peftops.QLoRAConfig())
    frozen = sum(p.nbytes for p in attached.parameters() if not p.requires_grad)
    assert codes.weights < dense.weights / 4 and 0 <= codes.weights - frozen < 4096  # (buffers)
    assert codes.trainable == peftops.summary(attached).trainable
    assert "trains experts whole" in estimate(model, peftops.TopLayersConfig(layers=1), batch=1, length=8).why_not
