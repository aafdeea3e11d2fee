"""modules_to_save: what trains whole beside adapters."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from peftops import (
    BottleneckConfig,
    IA3Config,
    LoftQConfig,
    LongLoRAConfig,
    LoRAConfig,
    LQLoRAConfig,
    PromptTuningConfig,
    QLoRAConfig,
    VeRAConfig,
)
from peftops.attaching import adapted_layers, hosts
from peftops.integrations.peft_files import CONFIG, WEIGHTS
from peftops.methods.lora import LoRA
from peftops.nn import Select, is_quantized
from peftops.serving import add_adapter, pool_for

HEAD = "base_model.model.classifier.weight"


def shaken(config, build=models.bert):
    model = peftops.attach(build(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture
def saved(tmp_path):
    peftops.save(shaken(LoRAConfig(r=4, target=["query"], modules_to_save=["classifier"])), tmp_path)
    return tmp_path


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=4, target=["query"], modules_to_save=["classifier"]),
        QLoRAConfig(r=4, modules_to_save=["classifier"]),
        LoftQConfig(r=4, target=["query"], modules_to_save=["classifier", "pooler"]),
        LQLoRAConfig(r=4, target=["query"], modules_to_save=("classifier",)),
        VeRAConfig(r=4, target=["query"], modules_to_save=["pooler.dense", "classifier"]),
        IA3Config(target=["query"], modules_to_save=["classifier"]),
        PromptTuningConfig(tokens=3, modules_to_save=["classifier"]),
        BottleneckConfig(placement="houlsby", modules_to_save=["LayerNorm", "classifier"]),
        IA3Config(target=["query", "dense"], feedforward=["dense"], modules_to_save=["classifier", "layer.1.output"]),
    ],
    ids=lambda c: type(c).__name__,
)
def test_trains_saves_and_leaves(tmp_path, config):
    inputs, start = models.inputs(models.bert), models.bert().state_dict()
    model = shaken(config)
    found = {path: layer.adapters["default"] for path, layer in adapted_layers(model)}
    assert type(found["classifier"]) is Select
    assert any(type(host.adapters["default"]) is not Select for _, host in hosts(model))
    for path in (path for path, adapter in found.items() if type(adapter) is Select):
        assert not is_quantized(getattr(dict(adapted_layers(model))[path].base, "weight", None)), path
    logits = model(**inputs).logits
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found["classifier"].parameters())

    peftops.save(model, tmp_path)
    again = peftops.load(models.bert(), tmp_path)
    assert again._peftops.configs["default"].modules_to_save == tuple(config.modules_to_save)
    torch.testing.assert_close(again(**inputs).logits, logits, rtol=1e-5, atol=1e-6)

    if not isinstance(config, BottleneckConfig | PromptTuningConfig):
        peftops.merge(model, dense=True)
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-3, atol=1e-4)
    peftops.detach(model)
    assert torch.equal(model.classifier.weight, start["classifier.weight"]) and type(model.classifier) is nn.Linear


def test_training_whole_wins_over_an_adapter_on_the_same_layer(tmp_path):
    model = shaken(LoRAConfig(r=4, target=["query", "dense"], modules_to_save=["layer.0.output"]))
    kinds = {path: type(layer.adapters["default"]) for path, layer in adapted_layers(model)}
    assert kinds["bert.encoder.layer.0.output.dense"] is kinds["bert.encoder.layer.0.output.LayerNorm"] is Select
    assert kinds["bert.encoder.layer.1.output.dense"] is LoRA
    # "layer.0.output" is no part of "layer.0.attention.output"
    assert kinds["bert.encoder.layer.0.attention.output.dense"] is LoRA
    peftops.save(model, tmp_path)
    inputs = models.inputs(models.bert)
    again = peftops.load(models.bert(), tmp_path)
    assert {path: type(layer.adapters["default"]) for path, layer in adapted_layers(again)} == kinds
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_longlora_keeps_its_own_and_the_head():
    model = peftops.attach(models.llama(tied=False), LongLoRAConfig(r=2, modules_to_save=["lm_head"]))
    kinds = {path: type(layer.adapters["default"]) for path, layer in adapted_layers(model)}
    assert kinds["lm_head"] is kinds["model.norm"] is kinds["model.embed_tokens"] is Select


@pytest.mark.parametrize(
    "names, message",
    [
        ("classifier", "modules_to_save must be a list of names, not 'classifier'"),
        ([""], r"modules_to_save must be a list of names, not \[''\]"),
        ([1], r"modules_to_save must be a list of names, not \[1\]"),
        (["classifier", "clasifier"], r"modules_to_save \['clasifier'\] matches no layer.*did you mean: classifier"),
        (["dropout"], "has no parameters in dropout to train"),
        (["attention"], r"\['attention'\] has all that target \['query'\]"),
    ],
)
def test_bad_names_raise_and_change_nothing(names, message):
    model = models.bert()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        peftops.attach(model, QLoRAConfig(r=4, target=["query"], modules_to_save=names))
    assert [type(m) for m in model.modules()] == before


def test_codes_cannot_train_whole():
    model = peftops.attach(models.bert(), QLoRAConfig(r=4))
    with pytest.raises(TypeError, match="pooler.dense.weight is quantised, and codes cannot be trained"):
        peftops.attach(model, LoRAConfig(r=4, modules_to_save=["pooler"]), name="second")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(HEAD), "does not fit: classifier.weight is missing"),
        (lambda t: (t.pop(HEAD), t.pop(HEAD.replace("weight", "bias"))), "does not fit: classifier.weight is missing"),
        (lambda t: t.update({HEAD: torch.zeros(3, 64)}), r"classifier.weight has shape \[3, 64\], expected \[2, 64\]"),
    ],
)
def test_a_file_whose_head_does_not_fit_raises(saved, change, message):
    change_tensors(saved, change)
    with pytest.raises(ValueError, match=message):
        peftops.load(models.bert(), saved)


def test_names_of_a_file_that_are_no_list_raise(saved):
    fields = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**fields, "modules_to_save": "classifier"}))
    with pytest.raises(ValueError, match="modules_to_save must be a list of names, not 'classifier'"):
        peftops.load(models.bert(), saved)


def test_a_name_that_neither_the_file_nor_the_model_knows_means_nothing(saved):
    fields = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**fields, "modules_to_save": ["classifier", "score"]}))
    assert peftops.load(models.bert(), saved)._peftops.configs["default"].modules_to_save == ("classifier",)


@pytest.mark.parametrize("names, task", [([], None), (["LayerNorm"], None), (["classifier"], "SEQ_CLS")])
def test_peft_is_told_of_a_classifier_that_is_in_the_file_alone(tmp_path, names, task):
    peft = pytest.importorskip("peft")
    model = shaken(LoRAConfig(r=4, target=["query"], modules_to_save=names))
    peftops.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == task
    other, inputs = peft.PeftModel.from_pretrained(models.bert(), tmp_path).eval(), models.inputs(models.bert)
    torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_pool_holds_no_head(saved):
    pool = pool_for(models.bert(), target=["query"])
    with pytest.raises(ValueError, match=r"has base_model.model.classifier.\w+; a pool holds A and B of linear layers"):
        add_adapter(pool, "one", saved)


HEADS = [
    (models.bert, LoRAConfig(r=2), "classifier"),
    (models.vit, LoRAConfig(r=2), "classifier"),
    (models.bert, peftops.TopLayersConfig(layers=1), "classifier"),
    (models.bert, peftops.SurgicalConfig(), "classifier"),
    (models.llama, LoRAConfig(r=2), None),
    (models.mlp, LoRAConfig(r=2), None),
    (models.bert, peftops.HeadOnlyConfig(), None),
    (models.bert, LoRAConfig(r=2, modules_to_save=["classifier"]), None),
    (models.bert, LoRAConfig(r=2, target=["query", "classifier"]), None),
    (models.bert, peftops.TopLayersConfig(layers=1, head=True), None),
]


@pytest.mark.parametrize("build, config, head", HEADS)
def test_a_head_that_will_not_train_is_told(build, config, head):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peftops.attach(build(), config)
    told = [str(w.message) for w in caught if "will not train" in str(w.message)]
    assert len(told) == (head is not None)
    assert all(re.match(f"{head} of .* modules_to_save=\\['{head}'\\]", message) for message in told)
