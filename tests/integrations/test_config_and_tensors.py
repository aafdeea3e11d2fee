"""A config and tensors that disagree are refused by whatever reads them, and nothing has changed then."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import peftops
from examples import VARIANTS, example_of
from moe_models import moe
from peftops.attaching import METHODS
from peftops.cli import main
from peftops.integrations.peft_files import read_adapter, refill
from peftops.serving import add_adapter, pool_for

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
examples = {c.__name__.removesuffix("Config").lower(): example_of(c) for c in METHODS} | VARIANTS


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    peftops.save(peftops.attach(models.llama(), peftops.LoRAConfig(r=4, rank_pattern={"up_proj": 6})), folder)
    models.llama().save_pretrained(folder.parent / "model")
    models.tokenizer().save_pretrained(folder.parent / "model")
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "adapter")


def by_load(folder, capsys):
    peftops.load(models.llama(), folder)


def by_refill(folder, capsys):
    config, _ = read_adapter(folder.parent / "sound")
    refill(peftops.attach(models.llama(), config), folder)


def by_pool(folder, capsys):
    add_adapter(pool_for(models.llama(), rank=8), "a", folder)


def by_command(*words):
    def read(folder, capsys):
        assert main([word.format(folder, folder.parent) for word in words]) == 2
        raise ValueError(capsys.readouterr().err)

    return read


BASE = "--model", "{1}/model"
ASKED = "--prompt", "a", "--completion", "b"
READERS = {
    "load": by_load,
    "refill": by_refill,
    "pool": by_pool,
    "merge": by_command("merge", *BASE, "--adapter", "{0}", "--out", "{1}/merged"),
    "generate": by_command("generate", *BASE, "--adapter", "{0}", "abc"),
    "serve": by_command("serve", *BASE, "--adapters", "{0}", "--requests", "{1}/asked.jsonl", "--out", "{1}/out"),
    "serve over HTTP": by_command("serve", *BASE, "--adapters", "{0}", "--port", "0"),
    "influence": by_command("influence", *BASE, "--adapter", "{0}", "--train", "{1}/rows.jsonl", *ASKED),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "fields, layer, shape, rank",
    [
        ({"r": 8}, "down_proj", [4, 96], 8),
        ({"rank_pattern": {"up_proj": 6, "v_proj": 2}}, "v_proj", [4, 64], 2),
    ],
    ids=str,
)
def test_no_reader_takes_another_rank(sound, folder, reader, fields, layer, shape, rank, capsys):
    shutil.copytree(sound, folder.parent / "sound")
    shutil.copytree(sound.parent / "model", folder.parent / "model")
    (folder.parent / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    (folder.parent / "asked.jsonl").write_text('{"prompt": "a"}\n')
    edit(folder, **fields)
    with pytest.raises(ValueError) as raised:
        reader(folder, capsys)
    said = str(raised.value)
    assert f"{WEIGHTS} does not fit: model.layers." in said and f"{layer}.lora_A has shape {shape}" in said
    assert f"{CONFIG} says that its rank, dimension 0 of that, is {rank}" in said
    assert not (folder.parent / "merged").exists() and not (folder.parent / "out").exists()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("layer", ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_either_factor_tells(tmp_path, layer, factor):
    peftops.save(peftops.attach(models.llama(), peftops.LoRAConfig(r=4, target=["q_proj", "embed_tokens"])), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (key,) = (k for k in tensors if layer in k and (factor in k or factor.replace("_", "_embedding_") in k))
    tensors[key] = tensors[key].narrow(0 if "A" in factor else 1, 0, 3).contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=rf"does not fit: {layer}.lora_.* has shape .*, and .* is 4"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("example", examples.values(), ids=examples)
def test_no_method_takes_other_sizes(tmp_path, example):
    """Whatever whole number its config has that is a tensor's dimension."""
    config = example.config
    sizes = [f.name for f in dataclasses.fields(config) if f.name in ("r", "n", "tokens", "width", "rank_pattern")]
    peftops.save(peftops.attach(example.build(), config), tmp_path / "sound")
    fields = json.loads((tmp_path / "sound" / CONFIG).read_text())
    sizes = {name: fields[name] for name in (*sizes, "num_virtual_tokens", "adapter_len") if fields.get(name)}
    for name, value in sizes.items():
        for other in {value + 1, value - 1, 2 * value, value // 2} - {0, value}:
            folder = shutil.copytree(tmp_path / "sound", tmp_path / f"{name}-{other}")
            edit(folder, **{name: other})
            model = example.build()
            before = [type(module) for module in model.modules()]
            with pytest.raises(ValueError, match=r"does not fit|unexpected"):
                peftops.load(model, folder)
            assert [type(module) for module in model.modules()] == before


def test_a_start_that_a_pool_would_lack_is_refused(tmp_path):
    """HF PEFT's PiSSA files hold A and B alone, and the base that they were taken off is the other half."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa")
    peft.get_peft_model(models.llama(), config).save_pretrained(tmp_path / "peft")
    pool = pool_for(models.llama(), rank=8)
    with pytest.raises(TypeError, match=r"has rank 4 at model\..*, and a whole change of PiSSA has rank 8; load"):
        add_adapter(pool, "a", tmp_path / "peft")
    peftops.save(peftops.load(models.llama(), tmp_path / "peft"), tmp_path / "whole")
    add_adapter(pool, "a", tmp_path / "whole")


def test_experts_are_left_to_the_model(tmp_path):
    """A file's A of a stack of experts has the rank as often as there are experts."""
    model = peftops.attach(moe("Mixtral"), peftops.LoRAConfig(r=2, rank_pattern={"down_proj": 3}))
    peftops.save(model, tmp_path)
    again, ids = peftops.load(moe("Mixtral"), tmp_path), models.tokens(vocabulary=64)
    assert torch.equal(again(ids).logits, model(ids).logits)
    edit(tmp_path, r=3)
    with pytest.raises(ValueError, match="does not fit"):
        peftops.load(moe("Mixtral"), tmp_path)
