"""QA-LoRA as HF PEFT has it, ``use_qalora``: its variant of LoRA on our group-quantised layers, files both ways."""

import json

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import QALoRAConfig
from peftops.attaching import adapted_layers
from peftops.nn import GroupLinear

peft = pytest.importorskip("peft")
gptq = pytest.importorskip("peft.tuners.lora.gptq")
ids, qv = models.tokens(), ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def gptq_layers_are_ours(monkeypatch):
    """PEFT asks gptqmodel what a GPTQ layer is; here it is a GroupLinear, all of whose arithmetic is ours."""

    def dispatch(target, adapter_name, config, **kw):
        if isinstance(target, GroupLinear):
            return gptq.GPTQLoraLinear(target, adapter_name, config=config, **kw)
        return None

    monkeypatch.setattr("peft.tuners.lora.model.dispatch_gptq", dispatch)


def base(bits=4, group=16):
    model = models.llama()
    for layer in model.model.layers:
        for name in qv:
            dense = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, GroupLinear.from_dense(dense, bits=bits, group_size=group))
    return model


def shake(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def theirs(**options):
    config = {"r": 4, "lora_alpha": 6, "use_qalora": True, "target_modules": qv, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(base(), peft.LoraConfig(**config)).eval()
    shake(model)
    return model


@pytest.mark.parametrize("bits", [2, 4])
def test_peft_reads_ours(tmp_path, bits):
    config = QALoRAConfig(r=4, alpha=6.0, bits=bits, group_size=16, pool="peft", target=qv)
    model = peftops.attach(base(bits), config)
    shake(model)
    peftops.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(base(bits), tmp_path).eval()
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert (other(ids).logits - base(bits)(ids).logits).norm() > 0.1
    # what PEFT cannot do: merged, and exactly
    want = model(ids).logits
    assert peftops.merge(model).rounding < 1e-6
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_we_read_pefts(tmp_path):
    other = theirs()
    other.save_pretrained(tmp_path)
    model = peftops.load(base(), tmp_path)
    config = model._peftops.configs["default"]
    assert (type(config), config.pool, config.bits, config.group_size) == (QALoRAConfig, "peft", None, 16)
    assert len(list(adapted_layers(model))) == 4
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    for m in (model, other):
        m(input_ids=ids, labels=ids).loss.backward()
    theirs_ = {
        n.replace("base_model.model.", "").replace(".default.weight", ""): p.grad
        for n, p in other.named_parameters()
        if p.requires_grad
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            want = theirs_.pop(name.replace(".adapters.default", ""))
            torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-6)
    assert not theirs_
    peftops.save(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "again").eval()
    torch.testing.assert_close(again(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-6)


def test_a_base_that_the_file_is_not_for(tmp_path):
    theirs().save_pretrained(tmp_path)
    for model, message in (
        (models.llama(), "bits=None is for a base that is quantised in groups of 16, and model.layers.0.* is dense"),
        (base(group=32), "in groups of 32 already, and the adapter is for any bits in groups of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            peftops.load(model, tmp_path)
        assert not hasattr(model, "_peftops")


def test_ours_of_another_pooling_are_not_for_peft(tmp_path):
    peftops.save(peftops.attach(base(), QALoRAConfig(r=4, group_size=16, target=qv)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "QALORA"
    with pytest.raises((ValueError, KeyError)):
        peft.PeftModel.from_pretrained(base(), tmp_path)


def test_options_that_we_lack_are_refused(tmp_path):
    theirs(use_rslora=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this adapter needs use_rslora=True, which peftops does not support"):
        peftops.load(base(), tmp_path)
