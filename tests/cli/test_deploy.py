"""What was trained is what is deployed, for every method, on a tied and an untied model: the loss of an adapter is that
of what ``merge`` makes of it, whoever reads that."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import models
import peftops
from gptq_layout import dense_layers
from peftops.cli import main
from peftops.cli.data import encode, read_rows
from peftops.cli.finetune import METHOD_NAMES
from peftops.cli.model import answer
from peftops.cli.training import evaluate
from peftops.nn import GroupLinear

ROWS = [{"instruction": f"repeat {c}", "response": c * 6} for c in "abcdefgh"]
PLAIN = {"vera", "ia3", "headonly", "normtuning", "toplayers", "surgical", "prompttuning", "prefixtuning", "bottleneck"}
OPTIONS = {"relora": ["--r", 4, "--every", 2], "llamaadapter": ["--set", "layers=1"], **{name: [] for name in PLAIN}}
NOT_MERGED = {"bottleneck", "llamaadapter", "prompttuning", "prefixtuning"}
METHODS = sorted(set(METHOD_NAMES) - {"bitfit"})  # these models have no biases
HEADS = ["glora", "headonly", "loftq", "lora", "qalora"]  # on a model whose head is its own, each in its way
LAWS = [("tied", method) for method in METHODS] + [("untied", method) for method in HEADS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in ("tied", "untied")}
    for name, folder in made.items():
        models.llama(tied=name == "tied").save_pretrained(folder / "model")
        models.tokenizer().save_pretrained(folder / "model")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return made


@pytest.fixture
def folder(folders):
    return folders["tied"]


def command(*argv):
    return main([str(part) for part in argv])


def train(folder, out, method, *more):
    more = more or OPTIONS.get(method, ["--r", 4])
    rows = folder / "rows.jsonl"
    assert (
        command(
            "finetune",
            "--model",
            folder / "model",
            "--train",
            rows,
            "--eval",
            rows,
            "--method",
            method,
            "--out",
            out,
            "--steps",
            2,
            "--lr",
            0.02,
            "--batch",
            4,
            "--ask",
            "hi",
            *more,
        )
        == 0
    )
    return json.loads((out / "report.json").read_text())


def losses(folder, merged):
    """Of a directory as we read it, and as transformers does."""
    examples = encode(read_rows(folder / "rows.jsonl"), models.tokenizer(), 512)
    read = peftops.load_model(merged, quantize=False), transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    return [evaluate(model, examples, 4, 2) for model in read]


@pytest.mark.parametrize("kind, method", LAWS)
def test_a_merged_model_has_the_loss_of_its_adapter(folders, tmp_path, kind, method, capsys):
    folder = folders[kind]
    report = train(folder, tmp_path / "run", method)
    argv = ["merge", "--model", folder / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "merged"]
    if method in NOT_MERGED:
        assert command(*argv) == 2 and "cannot be merged into the weights" in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()
        return
    assert command(*argv) == 0
    assert report["loss_after"] != pytest.approx(report["loss_before"], rel=1e-3)
    assert losses(folder, tmp_path / "merged") == pytest.approx([report["loss_after"]] * 2, rel=2e-6)


def test_modules_that_train_whole_are_merged_too(folder, tmp_path):
    report = train(folder, tmp_path / "run", "lora", "--r", 4, "--set", "modules_to_save=['lm_head']")
    assert command("merge", "--model", folder / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "m") == 0
    assert losses(folder, tmp_path / "m") == pytest.approx([report["loss_after"]] * 2, rel=2e-6)


@pytest.mark.parametrize("kind, bits", [("tied", 4), ("untied", 3), ("untied", 8)])
def test_qalora_is_deployed_in_its_codes(folders, tmp_path, kind, bits):
    """That is what it is for: the merged model has the adapter's loss, and the size of codes."""
    folder = folders[kind]
    report = train(folder, tmp_path / "run", "qalora", "--r", 4, "--set", f"bits={bits}")
    argv = ["merge", "--model", folder / "model", "--adapter", tmp_path / "run", "--packed", "--out"]
    assert command(*argv, tmp_path / "m") == 0
    model = peftops.load_model(tmp_path / "m", quantize=False)
    examples = encode(read_rows(folder / "rows.jsonl"), models.tokenizer(), 512)
    assert evaluate(model, examples, 4, 2) == pytest.approx(report["loss_after"], rel=1e-6)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, GroupLinear) and layer.weight.bits == bits


def test_the_packed_files_are_read_by_gptqs_definition(folder, tmp_path):
    """By nothing of ours, into transformers' own model. transformers itself needs GPTQ's kernels for such a directory,
    and these need whole zeros: it says what it lacks and reads nothing wrong."""
    report = train(folder, tmp_path / "run", "qalora", "--r", 4)
    argv = ["merge", "--model", folder / "model", "--adapter", tmp_path / "run", "--packed", "--out", tmp_path / "m"]
    assert command(*argv) == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    how = config.quantization_config
    assert how["quant_method"] == "gptq" and how["desc_act"] is False and how["group_size"] == 32
    with pytest.raises(ImportError, match="gptqmodel|optimum"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    layers = dense_layers(load_file(tmp_path / "m" / "model.safetensors"), how["bits"])
    assert model.load_state_dict(layers, strict=False).unexpected_keys == []
    examples = encode(read_rows(folder / "rows.jsonl"), models.tokenizer(), 512)
    assert evaluate(model, examples, 4, 2) == pytest.approx(report["loss_after"], rel=1e-6)


def test_only_qalora_stays_in_codes(folder, tmp_path, capsys):
    train(folder, tmp_path / "run", "lora")
    argv = ["merge", "--model", folder / "model", "--adapter", tmp_path / "run", "--packed", "--out", tmp_path / "m"]
    assert command(*argv) == 2 and "--packed is for QA-LoRA" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "qalora", "qlora", "relora"])
def test_generate_answers_as_the_adapter_does_where_it_was_trained(folder, tmp_path, method, capsys):
    """The adapter says which base it stands on; nobody has to."""
    train(folder, tmp_path / "run", method)
    model = peftops.load(peftops.load_model(folder / "model", quantize=False), tmp_path / "run")
    expected = answer(model, models.tokenizer(), [{"role": "user", "content": "repeat a"}], 8)
    capsys.readouterr()
    argv = ["generate", "--model", folder / "model", "--adapter", tmp_path / "run", "--max-tokens", 8, "repeat a"]
    assert command(*argv) == 0
    assert capsys.readouterr().out.strip("\n") == expected


def test_qlora_can_be_asked_for_on_a_dense_base(folder, tmp_path):
    train(folder, tmp_path / "run", "qlora")
    argv = ["merge", "--model", folder / "model", "--adapter", tmp_path / "run", "--dense", "--out", tmp_path / "m"]
    assert command(*argv) == 0
    dense = peftops.load(peftops.load_model(folder / "model", quantize=False), tmp_path / "run", quantize=False)
    peftops.merge(dense)
    want = peftops.detach(dense, merged=True)
    got = peftops.load_model(tmp_path / "m", quantize=False)
    assert all(torch.equal(p, q) for p, q in zip(got.parameters(), want.parameters(), strict=True))


def test_merging_writes_all_or_nothing(folder, tmp_path, capsys, monkeypatch):
    train(folder, tmp_path / "run", "lora")
    argv = ["merge", "--model", folder / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "m"]

    def full(self, directory, **_):
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        assert command(*argv) == 2 and "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    assert command(*argv) == 2 and "holds files already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["notes.txt"]


def test_biases_that_a_model_has_no_place_for_are_refused(tmp_path, capsys):
    """GLoRA makes biases; a configuration of Qwen2 has none for its output projections."""
    models.qwen2().save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    train(tmp_path, tmp_path / "run", "glora")
    argv = ["merge", "--model", tmp_path / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "m"]
    assert command(*argv) == 2
    error = capsys.readouterr().err
    assert "has no place for model.layers.0" in error and "new_bias=False" in error and not (tmp_path / "m").exists()
    train(tmp_path, tmp_path / "without", "glora", "--r", 4, "--set", "new_bias=False")
    argv[argv.index(tmp_path / "run")] = tmp_path / "without"
    assert command(*argv) == 0
