"""``quantize_model``: block by block with the quantised model's own inputs, in little memory, resumable."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from gguf_file import write_gguf
from peftops.integrations import calibration
from peftops.integrations.calibration import CalibrationConfig, quantize_model
from peftops.nn import NF4Linear

ROWS = [models.tokens(1, length, seed=seed)[0] for seed, length in enumerate([40] * 30 + [25] * 20 + [1])]
pytestmark = pytest.mark.filterwarnings("ignore:.* tokens are few to calibrate with")


def llama(seed=0, intermediate=128):
    """Whose rows are whole blocks, as bitsandbytes' CPU build needs them, and whose inputs are of a few directions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.get_input_embeddings().weight.data *= torch.exp(torch.randn(64))
    return model


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    models.tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(model):
    return model(models.tokens()).logits


def distance(model, dense):
    x = torch.stack(ROWS[:30])
    return (model(x).logits - dense(x).logits).norm().item()


def test_a_path_and_a_module_give_the_same_and_beat_plain_nf4(folder):
    read, report = quantize_model(folder, ROWS)
    model = llama()
    changed, again = quantize_model(model, ROWS)
    assert changed is model and torch.equal(logits(read), logits(model))
    assert [layer.name for layer in report.layers] == [layer.name for layer in again.layers]
    assert sum(isinstance(m, NF4Linear) for m in read.modules()) == 14 == len(report.layers)
    assert read.lm_head.weight is read.model.embed_tokens.weight and not read.training
    assert not any(p.requires_grad for p in read.parameters())
    assert distance(read, llama()) < 0.8 * distance(peftops.load_model(folder), llama())
    assert report.error < 0.8 * report.plain_error and f"{report.tokens:,} tokens" in str(report)
    assert all(layer.rows == report.tokens == sum(map(len, ROWS)) for layer in report.layers)
    assert all(layer.error <= layer.plain_error for layer in report.layers)


def test_reads_gguf(tmp_path):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", llama())
    read, report = quantize_model(tmp_path / "model.gguf", ROWS)
    dense = peftops.load_model(tmp_path / "model.gguf", quantize=False)
    model, again = quantize_model(dense, ROWS)
    assert torch.equal(logits(read), logits(model)) and len(report.layers) == len(again.layers) == 14


@pytest.mark.parametrize("build", [models.llama, models.qwen2, models.mistral, models.gemma, models.gpt2])
def test_blocks_see_what_the_quantised_model_gives_them(build, monkeypatch):
    """The last block's inputs, block by block, are those of the finished model."""
    seen, own = [], calibration._run

    def run(block, x, call):
        seen.append((block, x))
        return own(block, x, call)

    monkeypatch.setattr(calibration, "_run", run)
    model, _ = quantize_model(build(), ROWS[:30])
    last = model.get_submodule(calibration.blocks(model)[-1])
    got = next(x for block, x in reversed(seen) if block is last)
    want = []
    handle = last.register_forward_pre_hook(lambda _, args: want.append(args[0]))
    model(torch.stack(ROWS[:30]))
    handle.remove()
    assert torch.allclose(got, want[0], atol=1e-5)
    names = calibration.find_targets(model, "all-linear")
    assert all(isinstance(model.get_submodule(name), NF4Linear) for name in names)


@pytest.mark.parametrize("layout", ["bitsandbytes", "peftops"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_give_the_model_again(folder, tmp_path, layout, dtype):
    config, out = CalibrationConfig(layout=layout), tmp_path / "out"
    model, report = quantize_model(folder, ROWS, config, out=out, tokenizer=models.tokenizer(), dtype=dtype)
    assert torch.equal(logits(peftops.load_model(out, dtype=dtype)), logits(model))
    told = json.loads((out / "calibration.json").read_text())
    assert [layer["name"] for layer in told["layers"]] == [layer.name for layer in report.layers]
    weights = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file for file in set(weights.values()) for name in load_file(out / file)} == weights
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")] and (out / "tokenizer.json").exists()


def test_transformers_reads_it_with_bitsandbytes_and_computes_the_same(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    model, _ = quantize_model(folder, ROWS, out=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(theirs.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert torch.allclose(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_conv1d_goes_into_our_own_layout_alone(tmp_path):
    models.gpt2().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="bitsandbytes' layout has no Conv1D.*layout='peftops'"):
        quantize_model(tmp_path / "dense", ROWS, out=tmp_path / "out")
    model, _ = quantize_model(tmp_path / "dense", ROWS, CalibrationConfig(layout="peftops"), out=tmp_path / "out")
    assert torch.equal(logits(peftops.load_model(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_that_the_model_does_not_have_is_refused(token):
    with pytest.raises(ValueError, match=f"hold a token {token}, and the model has those from 0 to 319"):
        quantize_model(llama(), [[5, 6], [7, token]])
    quantize_model(llama(), [[5, 6], [7, 319]])


def renamed(tensors, reports):
    tensors["x"] = tensors.pop("model.layers.0.input_layernorm.weight")


def missing(tensors, reports):
    del tensors["model.layers.0.input_layernorm.weight"]


def reshaped(tensors, reports):
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(63)


def of_another_dtype(tensors, reports):
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(64, dtype=torch.float64)


def without_codes(tensors, reports):
    del tensors["model.layers.0.mlp.up_proj.weight.absmax"]


def of_other_layers(tensors, reports):
    reports.pop()


def of_a_name_that_is_none(tensors, reports):
    reports[0]["name"] = 3


DAMAGES = [renamed, missing, reshaped, of_another_dtype, without_codes, of_other_layers, of_a_name_that_is_none]


def test_a_damaged_unfinished_run_is_refused(folder, tmp_path):
    """Nothing of another model, and nothing that is missing, gets into the result."""

    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(folder, ROWS, out=tmp_path / "out", on_block=stop)
    file, settings = (tmp_path / ".out.unfinished" / name for name in ("block-00000.safetensors", "settings.json"))
    with safe_open(file, "pt") as opened:
        sound, told = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()
    for damage in DAMAGES:
        tensors, reports = dict(sound), json.loads(told["reports"])
        damage(tensors, reports)
        save_file(tensors, file, told | {"reports": json.dumps(reports)})
        with pytest.raises(ValueError, match="block-00000.safetensors is damaged"):
            quantize_model(folder, ROWS, out=tmp_path / "out")
        assert not (tmp_path / "out").exists(), damage.__name__
    for text in ("[1]", "3", "{", "[" * 100_000):
        settings.write_text(text)
        with pytest.raises(ValueError, match="is of an unfinished run with another"):
            quantize_model(folder, ROWS, out=tmp_path / "out")


@pytest.mark.parametrize("layout", ["bitsandbytes", "peftops"])
def test_goes_on_after_a_kill(folder, tmp_path, monkeypatch, layout):
    from transformers.models.llama.modeling_llama import LlamaMLP

    of_mlp = LlamaMLP.__init__

    def with_buffers(self, config):  # that no file holds
        of_mlp(self, config)
        self.register_buffer("made_anew", torch.zeros(3), persistent=False)
        self.register_buffer("not_there", None)

    monkeypatch.setattr(LlamaMLP, "__init__", with_buffers)
    config, whole = CalibrationConfig(layout=layout), tmp_path / "whole"
    quantize_model(folder, ROWS, config, out=whole)

    def stop(done, of):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(folder, ROWS, config, out=tmp_path / "out", on_block=stop)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out.unfinished").glob("block-*"))) == 1
    with pytest.raises(ValueError, match="unfinished run with another block_size; delete it to begin anew"):
        quantize_model(folder, ROWS, CalibrationConfig(layout=layout, block_size=32), out=tmp_path / "out")
    with pytest.raises(ValueError, match="unfinished run with another rows"):
        quantize_model(folder, ROWS[1:], config, out=tmp_path / "out")
    made, calibrate = [], calibration._calibrate
    monkeypatch.setattr(calibration, "_calibrate", lambda *args: made.append(1) or calibrate(*args))
    _, report = quantize_model(folder, ROWS, config, out=tmp_path / "out")
    assert len(made) == 1 and len(report.layers) == 14
    for file in whole.glob("*.safetensors"):
        one, other = load_file(file), load_file(tmp_path / "out" / file.name)
        assert one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


class Experts(nn.Module):
    """A mixture whose experts are linear layers; the last one is never chosen."""

    def __init__(self, count=4):
        super().__init__()
        self.gate = nn.Linear(64, count)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)}) for _ in range(count)
        )
        with torch.no_grad():
            self.gate.bias[-1] = -1e4

    def forward(self, x):
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = chosen == i
            if rows.any():
                y[rows] = expert["down"](torch.relu(expert["up"](x[rows])))
        return y


def test_an_expert_that_sees_few_rows_becomes_plain_nf4_and_is_named():
    model = llama()
    for layer in model.model.layers:
        layer.mlp = Experts()
    plain = {name: peftops.nf4_quantize(m.weight) for name, m in model.named_modules() if name.endswith("experts.3.up")}
    model, report = quantize_model(model, ROWS)
    found = {layer.name: layer for layer in report.layers}
    for name, weight in plain.items():
        assert found[name].rows == 0 and found[name].why_plain == "there are no calibration rows"
        assert torch.equal(model.get_submodule(name).weight, weight)
    used = [layer for name, layer in found.items() if "experts.0." in name or "experts.1." in name]
    assert any(layer.why_plain is None and layer.rows < report.tokens for layer in used)
    assert "experts.3.up, as there are no calibration rows" in str(report)


@pytest.mark.filterwarnings("error")
def test_few_tokens_get_a_warning():
    with pytest.warns(UserWarning, match="75 tokens are few to calibrate with; 2000 are the least"):
        quantize_model(llama(), ROWS[-4:-1])
    quantize_model(llama(), [models.tokens(1, 64, seed=i)[0] for i in range(32)])


def test_bad_input(folder, tmp_path):
    with pytest.raises(ValueError, match="there are no calibration rows"):
        quantize_model(folder, [[]])
    with pytest.raises(ValueError, match="hold a token 320, and the model has those from 0 to 319"):
        quantize_model(folder, [[1, 320]])
    with pytest.raises(ValueError, match="has 65 tokens, and the model 64 positions"):
        quantize_model(folder, [[1] * 65])
    with pytest.raises(ValueError, match="layout must be one of"):
        CalibrationConfig(layout="gguf")
    with pytest.raises(FileNotFoundError):
        quantize_model(tmp_path / "none", ROWS)
    quantize_model(folder, ROWS, out=tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds files already"):
        quantize_model(folder, ROWS, out=tmp_path / "out")
    with pytest.raises(ValueError, match="is quantised already: the dense weights are gone"):
        quantize_model(tmp_path / "out", ROWS)
    with pytest.raises(ValueError, match="LlamaForCausalLM has adapters; merge and detach them first"):
        quantize_model(peftops.attach(llama(), peftops.LoRAConfig()), ROWS)


def test_an_error_leaves_a_module_as_it_was():
    model = llama()
    before, broken = logits(model), model.model.layers[1]
    broken.mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj: .*NaN"):
        quantize_model(model, ROWS)
    broken.mlp.up_proj.weight.data[0, 0] = 0
    assert not any(isinstance(m, NF4Linear) for m in model.modules()) and logits(model).shape == before.shape
