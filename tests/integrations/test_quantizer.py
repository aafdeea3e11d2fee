"""transformers' own ``from_pretrained`` and ``save_pretrained`` with our formats."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from peftops.nn import GroupLinear, NF4Linear, is_quantized
from proves import proves

transformers = pytest.importorskip("transformers")
BUILDS = [models.llama, models.gpt2, models.bert, models.t5, models.vit]
every_model = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
CONFIGS = {
    "nf4": lambda: peftops.NF4Config(),
    "nf4-128": lambda: peftops.NF4Config(block_size=128, double_quant=False),
    "group": lambda: peftops.GroupConfig(bits=3, group_size=16),
    "group-8": lambda: peftops.GroupConfig(bits=8, symmetric=True),
}


def read(build, folder, **options):
    return type(build()).from_pretrained(folder, **options)


def outputs(model, build):
    with torch.no_grad():
        return model(**models.inputs(build)).logits


def codes(model):
    return {name: p for name, p in model.named_parameters() if is_quantized(p)}


def same(a, b):
    own, other = (dict(m.named_parameters()) for m in (a, b))
    assert own.keys() == other.keys()
    return all(type(p) is type(other[name]) and torch.equal(p, other[name]) for name, p in own.items())


@proves("transformers.from_pretrained", load="one tensor at a time", save="`save_pretrained`, bit for bit")
@every_model
@pytest.mark.parametrize("config", CONFIGS)
def test_quantised_while_read_and_the_same_bits_from_its_files(tmp_path, build, config):
    build().save_pretrained(tmp_path / "dense")
    model = read(build, tmp_path / "dense", quantization_config=CONFIGS[config]())
    dense = build()
    kind = GroupLinear if config.startswith("group") else NF4Linear
    replaced = {name for name, layer in model.named_modules() if isinstance(layer, kind)}
    assert replaced and model.is_quantized and model.is_loaded_in_4bit == config.startswith("nf4")
    assert model.num_parameters() == dense.num_parameters()
    held = [*model.parameters(), *model.buffers()]
    assert model.get_memory_footprint() == pytest.approx(sum(t.nbytes for t in held))
    model.save_pretrained(tmp_path / "codes")
    again = read(build, tmp_path / "codes")
    assert same(again, model) and torch.equal(outputs(again, build), outputs(model, build))
    again.save_pretrained(tmp_path / "twice")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("codes", "twice"))
    assert once.keys() == twice.keys()
    assert same(peftops.load_model(tmp_path / "twice"), model)
    want = outputs(model, build)
    model.dequantize()
    assert not model.is_quantized and not codes(model) and type(model) is type(dense)
    torch.testing.assert_close(outputs(model, build), want, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "back")
    assert torch.equal(outputs(read(build, tmp_path / "back"), build), outputs(model, build))


@proves("bitsandbytes", load="its files, and its live layers", save="its files")
@every_model
def test_bitsandbytes_reads_its_own_layout(tmp_path, build):
    bnb = pytest.importorskip("bitsandbytes")
    build().save_pretrained(tmp_path / "dense")
    config = peftops.NF4Config(layout="bitsandbytes", skip=["wo", "v_proj"])
    model = read(build, tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "bnb")
    fields = json.loads((tmp_path / "bnb/config.json").read_text())
    assert fields["quantization_config"]["quant_method"] == "bitsandbytes"
    theirs = dict(read(build, tmp_path / "bnb").named_modules())
    own = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert {name for name, layer in own.items() if is_quantized(layer.weight)} == {
        name for name, layer in theirs.items() if isinstance(layer, bnb.nn.Linear4bit)
    }
    for name, layer in own.items():
        if is_quantized(layer.weight):
            other, state = theirs[name].weight, theirs[name].weight.quant_state
            assert torch.equal(other.flatten().view(torch.uint8), layer.weight.packed), name
            assert torch.equal(state.absmax, layer.weight._absmax) and state.shape == layer.weight.shape
            assert torch.equal(state.state2.absmax, layer.weight._absmax_scale)
    assert same(peftops.load_model(tmp_path / "bnb"), model)


def test_gptq_layout_and_both_of_its_zeros(tmp_path):
    models.llama().save_pretrained(tmp_path / "dense")
    config = peftops.GroupConfig(layout="gptq", symmetric=True)
    model = read(models.llama, tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "gptq")
    assert same(peftops.load_model(tmp_path / "gptq"), model)
    file, config = tmp_path / "gptq/model.safetensors", tmp_path / "gptq/config.json"
    from peftops.integrations.gptq_files import to_gptq_integers

    tensors = load_file(file)
    for name, layer in model.named_modules():
        if isinstance(layer, GroupLinear):
            parts, _ = to_gptq_integers(layer.weight)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, file, {"format": "pt"})
    v1 = peftops.load_model(tmp_path / "gptq")
    fields = json.loads(config.read_text())
    fields["quantization_config"]["checkpoint_format"] = "gptq_v2"
    config.write_text(json.dumps(fields))
    v2 = peftops.load_model(tmp_path / "gptq")
    for one, other in zip(codes(v1).values(), codes(v2).values(), strict=True):
        assert torch.equal(one.zeros, torch.full_like(one.zeros, 8)) and torch.equal(other.zeros + 1, one.zeros)


def test_what_stays_dense(tmp_path):
    models.llama(tied=False).save_pretrained(tmp_path)
    model = read(models.llama, tmp_path, quantization_config=peftops.NF4Config(skip=["v_proj", "layers.1.mlp"]))
    left = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    mlp = {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert left == {"lm_head", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", *mlp}
    model.save_pretrained(tmp_path / "codes")
    assert same(read(models.llama, tmp_path / "codes"), model)


def test_a_new_head_is_dense_and_trains(tmp_path):
    models.llama().save_pretrained(tmp_path)
    kind = transformers.LlamaForSequenceClassification
    model = kind.from_pretrained(tmp_path, num_labels=3, quantization_config=peftops.NF4Config())
    assert type(model.score) is nn.Linear and model.score.weight.requires_grad and len(codes(model)) == 14
    assert model.score.weight.isfinite().all() and model.score.weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_attention(tmp_path, dtype):
    models.llama(dtype=dtype).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", attn_implementation="eager", device_map="cpu", quantization_config=peftops.NF4Config()
    )
    assert model.dtype == dtype and {p.dtype for p in codes(model).values()} == {dtype}
    want = peftops.detach(peftops.attach(models.llama(dtype=dtype), peftops.QLoRAConfig()))
    assert all(torch.equal(p, codes(want)[name]) for name, p in codes(model).items())


def test_codes_that_no_configuration_tells_of(tmp_path):
    """peftops.attach quantised them; the files have to be enough."""
    model = peftops.detach(peftops.attach(models.llama(), peftops.QLoRAConfig(block_size=128)))
    model.save_pretrained(tmp_path)
    for again in (
        peftops.load_model(tmp_path),
        peftops.load_model(tmp_path, quantize=False),
        read(models.llama, tmp_path, quantization_config=peftops.NF4Config()),
    ):
        assert same(again, model)


def test_damaged_codes(tmp_path):
    models.llama().save_pretrained(tmp_path / "dense")
    read(models.llama, tmp_path / "dense", quantization_config=peftops.NF4Config()).save_pretrained(tmp_path / "codes")
    file, layer = tmp_path / "codes/model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)

    def refused(message, **changed):
        save_file(
            {key: t for key, t in (tensors | {f"{layer}.{k}": v for k, v in changed.items()}).items() if t is not None},
            file,
            {"format": "pt"},
        )
        for reader in (lambda: read(models.llama, tmp_path / "codes"), lambda: peftops.load_model(tmp_path / "codes")):
            with pytest.raises(ValueError, match=message):
                reader()

    refused(
        r"up_proj.weight: weight.packed is torch.uint8 \[7\], not torch.uint8 \[3072\]",
        packed=torch.zeros(7, dtype=torch.uint8),
    )
    refused("up_proj.weight: weight._absmax is missing", _absmax=None)
    refused("weight._absmax_scale holds a NaN or an infinity", _absmax_scale=torch.full((1,), float("nan")))
    refused("weight._absmax has 5 blocks, which do not fit", _absmax=torch.zeros(5, dtype=torch.uint8))
    save_file(
        load_file(tmp_path / "dense/model.safetensors") | {layer: torch.full((96, 64), float("inf"))},
        file,
        {"format": "pt"},
    )
    (tmp_path / "codes/config.json").write_text((tmp_path / "dense/config.json").read_text())
    with pytest.raises(ValueError, match="up_proj.weight: nf4_quantize: weight holds a NaN or an infinity"):
        read(models.llama, tmp_path / "codes", quantization_config=peftops.NF4Config())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: peftops.NF4Config(block_size=48), "block_size must be one of 32"),
        (lambda: peftops.NF4Config(double_quant="yes"), "double_quant must be one of True, False"),
        (lambda: peftops.NF4Config(skip="lm_head"), "skip must be a list"),
        (lambda: peftops.NF4Config(layout="awq"), "layout must be one of 'peftops', 'bitsandbytes'"),
        (lambda: peftops.NF4Config(quant_method="gptq"), "is of quant_method 'peftops_nf4', not 'gptq'"),
        (lambda: peftops.GroupConfig(bits=5), "bits must be one of"),
        (lambda: peftops.GroupConfig(group_size=100), "group_size must be one of"),
    ],
    ids=range(7),
)
def test_options_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_importing_peftops_is_enough_and_imports_nothing(tmp_path):
    """In whatever order the two are imported; and transformers only where somebody asks for it."""
    models.llama().save_pretrained(tmp_path / "dense")
    model = read(models.llama, tmp_path / "dense", quantization_config=peftops.NF4Config())
    model.save_pretrained(tmp_path / "codes")
    code = f"""
        import sys
        import peftops
        assert "transformers" not in sys.modules, "peftops imports transformers"
        from transformers import LlamaForCausalLM
        model = LlamaForCausalLM.from_pretrained({str(tmp_path / "codes")!r})
        assert sum(isinstance(p, peftops.NF4Tensor) for p in model.parameters()) == 14
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[2])
