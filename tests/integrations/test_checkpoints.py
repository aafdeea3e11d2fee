"""``save_pretrained`` of a model with an adapter, and Trainer's checkpoints of it, are the adapter's files."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import METHOD_OF, of, trainer_of

import models
import peftops
from peftops.integrations.checkpoints import TRAINING
from peftops.integrations.peft_files import CONFIG, OWN, WEIGHTS

transformers = pytest.importorskip("transformers")
ids = models.tokens()


def shaken(model, std=0.1):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", sorted(METHOD_OF))
def test_it_is_peftops_save(tmp_path, method):
    """Of every method; and it never is a model whose layers have names that no loader finds."""
    _, model = of(method)
    model.save_pretrained(tmp_path / "a")
    peftops.save(model, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b") and files(tmp_path / "a").keys() == {CONFIG, OWN, WEIGHTS}


@pytest.mark.parametrize(
    "config",
    [
        peftops.LoRAConfig(r=4),
        peftops.LoRAConfig(r=4, target={"q_proj"}, modules_to_save=["lm_head"]),
        peftops.DoRAConfig(r=2),
        peftops.IA3Config(),
        peftops.PromptTuningConfig(tokens=3),
    ],
    ids=["lora", "head", "dora", "ia3", "prompt"],
)
@pytest.mark.parametrize("codes", [False, True], ids=["dense", "nf4"])
def test_hf_peft_reads_it(tmp_path, config, codes):
    """On the base that its files name, which transformers finds by itself."""
    peft = pytest.importorskip("peft")
    how = {"quantization_config": peftops.NF4Config()} if codes else {}
    if codes and type(config) is peftops.DoRAConfig:
        pytest.skip("HF PEFT has no DoRA on codes, and says so")
    models.llama(tied=False).save_pretrained(tmp_path / "base")
    base = lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **how)
    model = shaken(peftops.attach(base(), config))
    model.save_pretrained(tmp_path / "adapter")
    want = model(ids).logits
    close = lambda other: torch.testing.assert_close(other(ids).logits[:, -ids.shape[1] :], want, rtol=1e-5, atol=1e-5)
    close(peft.PeftModel.from_pretrained(base(), tmp_path / "adapter"))
    if type(config) is peftops.LoRAConfig:  # (others' tensors transformers alone renames, of PEFT's own files too)
        close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **how))


def test_a_state_dict_that_somebody_gathered_is_what_is_written(tmp_path):
    """As Trainer gives one where the model itself is in parts; under any wrapper's names."""
    for config in (peftops.LoRAConfig(r=2), peftops.MultiLoRAConfig(r=2), peftops.TiedLoRAConfig(r=2)):
        model = peftops.attach(models.llama(), config)
        other = shaken(copy.deepcopy(model))
        for wrapper in ("", "module.", "_orig_mod."):
            given = {wrapper + key: value for key, value in other.state_dict().items()}
            model.save_pretrained(tmp_path / "given", state_dict=given)
            other.save_pretrained(tmp_path / "own")
            assert files(tmp_path / "given") == files(tmp_path / "own")
    with pytest.raises(ValueError, match="state_dict has no model.layers.0.*, which is of the adapter 'default'"):
        model.save_pretrained(tmp_path / "none", state_dict={})
    assert not (tmp_path / "none").exists()


def test_what_has_no_place_is_refused_and_nothing_is_written(tmp_path):
    model = peftops.attach(models.llama(), peftops.LoRAConfig(r=2))
    for option, value in {"variant": "fp16", "save_peft_format": False, "distributed_checkpoint": True}.items():
        with pytest.raises(ValueError, match=rf"{option} is not for adapters.*peftops.save\(model, directory\)"):
            model.save_pretrained(tmp_path / "no", **{option: value})
    with pytest.raises(TypeError, match="by their names"):
        model.save_pretrained(tmp_path / "no", True, None, False, "1GB")
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    shaken(model)
    peftops.merge(model)
    with pytest.raises(ValueError, match=r"an adapter is merged.*peftops.detach\(model, merged=True\)"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    want = model(ids).logits
    peftops.detach(model, merged=True).save_pretrained(tmp_path / "merged")  # a plain model again
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(ids).logits, want)


def test_copies_of_a_model_save_their_own(tmp_path):
    model = peftops.attach(models.llama(), peftops.LoRAConfig(r=2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shaken(other).save_pretrained(tmp_path)
        B = load_file(tmp_path / WEIGHTS)["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
        assert torch.equal(B, other.model.layers[0].mlp.up_proj.adapters["default"].lora_B) and B.any()


def test_push_to_hub_sends_the_same(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(transformers.PreTrainedModel, "push_to_hub", lambda self, *args, **kw: sent.append((args, kw)))
    model = peftops.attach(models.llama(), peftops.LoRAConfig(r=2))
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, token="t", commit_message="new")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine", max_shard_size="1GB")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, is_main_process=False)
    assert sent == [(("mine",), {"token": "t", "commit_message": "new"}), (("me/mine",), {})]


def test_a_checkpoint_has_the_numbers_that_train_where_the_adapters_file_has_others(tmp_path):
    """MultiLoRA's file is one LoRA; what is made of them is no way back to the same bits."""
    pytest.importorskip("accelerate")
    for config, more in ((peftops.LoRAConfig(r=2), False), (peftops.MultiLoRAConfig(r=2), True)):
        folder = tmp_path / type(config).__name__
        model = peftops.attach(models.llama(), config)
        trainer_of(model, folder, steps=1, save_strategy="steps", save_steps=1).train()
        assert (folder / "checkpoint-1" / TRAINING).exists() == more
        got = shaken(peftops.load(models.llama(), folder / "checkpoint-1"), 0)  # it is an adapter like any other
        assert got._peftops.configs["default"].r == 2
    file = folder / "checkpoint-1" / TRAINING
    file.write_bytes(file.read_bytes()[:-9])
    again = peftops.attach(models.llama(), config)
    with pytest.raises(ValueError, match=f"{TRAINING} is damaged or cut short"):
        trainer_of(again, folder, steps=2).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
