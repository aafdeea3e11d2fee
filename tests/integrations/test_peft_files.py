import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from peftops import LoRAConfig, QLoRAConfig
from peftops.attaching import adapted_layers
from peftops.integrations import files
from peftops.nn import NF4Linear

WEIGHTS = "adapter_model.safetensors"


def trained(config=None, seed=0, build=models.llama):
    model = peftops.attach(build(), config or LoRAConfig(r=4))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def saved(tmp_path):
    peftops.save(trained(), tmp_path)
    return tmp_path


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_the_files_are_those_of_peft(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["adapter_config.json", WEIGHTS, "peftops.json"]
    tensors = load_file(saved / WEIGHTS)
    assert len(tensors) == 28 and all(t.dtype == torch.float32 for t in tensors.values())
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (64, 4)
    fields = json.loads((saved / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["task_type"] == "CAUSAL_LM" and fields["inference_mode"] is True
    assert (fields["r"], fields["lora_alpha"], fields["bias"]) == (4, 8, "none")
    assert fields["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert list(fields) == sorted(fields)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=4, rslora=True, alpha=3.0, dropout=0.25),
        LoRAConfig(r=2, target=["q_proj", "layers.1.mlp.up_proj"]),
        LoRAConfig(r=3, target=r".*layers\.1\..*_proj"),
        LoRAConfig(r=4, rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 1.0}),
    ],
)
def test_round_trip_keeps_everything(tmp_path, config):
    model, ids = trained(config), models.tokens()
    peftops.save(model, tmp_path)
    other = peftops.load(models.llama(), tmp_path, name="back")
    assert torch.equal(other(ids).logits, model(ids).logits)
    got = other._peftops.configs["back"]
    assert (got.r, got.rslora, got.dropout) == (config.r, config.rslora, config.dropout)
    assert (got.rank_pattern, got.alpha_pattern) == (config.rank_pattern, config.alpha_pattern)


def test_a_qlora_adapter_quantises_its_base_again_unless_told_otherwise(tmp_path):
    config = QLoRAConfig(r=4, block_size=128, double_quant=False)
    model, ids = trained(config), models.tokens()
    peftops.save(model, tmp_path)
    other = peftops.load(models.llama(), tmp_path)
    assert torch.equal(other(ids).logits, model(ids).logits)
    layer = next(m for m in other.modules() if isinstance(m, NF4Linear))
    assert layer.weight.block_size == 128 and not layer.weight.double_quant
    dense = peftops.load(models.llama(), tmp_path, quantize=False)
    assert not any(isinstance(m, NF4Linear) for m in dense.modules())


def test_one_of_several_adapters(tmp_path):
    model, ids = trained(), models.tokens()
    want = model(ids).logits
    peftops.attach(model, LoRAConfig(r=2, target=["q_proj"]), name="other")
    peftops.save(model, tmp_path / "other")
    peftops.save(model, tmp_path / "default", name="default")
    assert len(load_file(tmp_path / "other" / WEIGHTS)) == 4
    assert torch.equal(peftops.load(models.llama(), tmp_path / "default")(ids).logits, want)
    with pytest.raises(ValueError, match="no adapter named 'third'; it has default, other"):
        peftops.save(model, tmp_path, name="third")


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_a_missing_file_raises(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*; is it the directory of an adapter"):
        peftops.load(models.llama(), saved)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_file_that_is_cut_short_raises(saved, cut):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:cut])
    model = models.llama()
    with pytest.raises(ValueError, match="is damaged or cut short"):
        peftops.load(model, saved)
    assert not hasattr(model, "_peftops")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"peft_type": "LORA"}', '{"peft_type": "BOFT"}', "{}", "\xff"])
def test_a_config_that_is_damaged_or_of_another_method_raises(saved, text):
    (saved / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is damaged|lacks r, lora_alpha|peft_type .* is not supported"):
        peftops.load(models.llama(), saved)


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_dora", True),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
    ],
)
def test_an_option_that_would_change_the_result_raises(saved, key, value):
    edit(saved / "adapter_config.json", lambda fields: fields.update({key: value}))
    with pytest.raises(ValueError, match=f"this adapter needs {key}=.*, which peftops does not support"):
        peftops.load(models.llama(), saved)


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
            "does not fit: model.layers.0.mlp.up_proj.lora_B is missing",
        ),
        (
            lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(5, 64)}),
            r"up_proj.lora_A has shape \[5, 64\], and adapter_config.json says that its rank, .*, is 4",
        ),
        (
            lambda t: t.update({"base_model.model.extra": torch.zeros(1)}),
            "has an unexpected tensor base_model.model.extra",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}),
            "has an unexpected tensor base_model.model.model.norm.weight",
        ),
        (lambda t: t.update({"base_model.model.other.lora_A.weight": torch.zeros(4, 64)}), "this one has no other"),
        (lambda t: t.update({"q_proj.lora_A.weight": torch.zeros(4, 64)}), "has an unexpected tensor q_proj"),
        (lambda t: t.clear(), "has no tensor of an adapted layer"),
    ],
)
def test_tensors_that_do_not_fit_raise_and_change_nothing(saved, change, message):
    change_tensors(saved, change)
    model = models.llama()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        peftops.load(model, saved)
    assert [type(m) for m in model.modules()] == before and not hasattr(model, "_peftops")


def test_loading_beside_another_adapter_fails_without_touching_it(saved):
    change_tensors(saved, lambda t: t.popitem())
    model, ids = trained(seed=3), models.tokens()
    want = model(ids).logits
    with pytest.raises(ValueError, match="does not fit"):
        peftops.load(model, saved, name="second")
    assert torch.equal(model(ids).logits, want) and list(model._peftops.configs) == ["default"]


def test_a_crash_while_writing_leaves_the_old_files(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def crash(tensors, path, metadata=None):
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftops.integrations.peft_files.save_file", crash)
    with pytest.raises(OSError, match="No space left"):
        peftops.save(trained(seed=5), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_files_are_readable_by_others_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        files.write_atomically(tmp_path / "file", lambda path: path.write_text("x"))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_directory_that_cannot_be_written_raises_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to directory .*file"):
        peftops.save(trained(), tmp_path / "file")
    with pytest.raises(OSError, match=r"has [\d]+ MiB free, but [\d]+ MiB are needed"):
        files.writable_directory(tmp_path, 1 << 60)


def test_loading_into_a_model_with_a_taken_name_raises(saved):
    model = trained()
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        peftops.load(model, saved)
    assert len(list(adapted_layers(model))) == 14
