"""Files of mixtures of experts: HF PEFT's adapters of parameters, our own, and checkpoints read into codes."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from moe_models import OPTIONS, moe
from peftops.attaching import hosts
from peftops.integrations import peft_experts
from peftops.integrations.bitsandbytes_files import to_bitsandbytes
from peftops.integrations.quantizer import dequantize

every_model = pytest.mark.parametrize("kind", OPTIONS)
ids = models.tokens(vocabulary=96)
TARGETS = {
    "both": ([], ["gate_up_proj", "down_proj"]),
    "one": ([], ["down_proj"]),
    "mixed": (["o_proj"], ["gate_up_proj"]),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * max(want.abs().max().item(), 1e-3))


@every_model
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_adapters_are_pefts_both_ways(kind, target, tmp_path):
    """Logits and gradients on the dense model, and the bytes of every tensor."""
    base, (modules, parameters) = moe(kind), target
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, target_parameters=[f"experts.{name}" for name in parameters]
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftops.load(copy.deepcopy(base), tmp_path / "theirs")
    want = theirs(ids).logits
    close(ours(ids).logits, want)
    for model in (theirs, ours):
        model(input_ids=ids, labels=ids).loss.backward()
    own = {
        f"base_model.model.{path}.{name}.weight": p.grad
        for path, host in hosts(ours)
        for name, p in host.adapters["default"].named_parameters()
    }
    own = peft_experts.to_peft(own, ours)
    grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert own.keys() == grads.keys()
    for key, grad in grads.items():
        close(own[key], grad)
    peftops.save(ours, tmp_path / "ours")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[1][key], t) for key, t in files[0].items())
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    close(back(ids).logits, want)
    on_codes = peftops.load(copy.deepcopy(base), tmp_path / "theirs", quantize=True)
    dense = peftops.load(dequantize(peftops.detach(copy.deepcopy(on_codes))), tmp_path / "theirs")
    assert peftops.summary(on_codes).packed and not peftops.summary(dense).packed
    close(on_codes(ids).logits, dense(ids).logits)


@pytest.mark.parametrize(
    "config",
    [
        peftops.QLoRAConfig(r=2),
        peftops.QALoRAConfig(r=2, target=["gate_up_proj", "down_proj"]),
        peftops.PiSSAConfig(r=2),
        peftops.LoRAConfig(r=2, target=r".*down_proj"),
        peftops.LoRAConfig(r=2, modules_to_save=["router"], rank_pattern={"gate_up_proj": 3}),
    ],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("kind", ["GptOss", "Llama4"])
def test_our_own_files(kind, config, tmp_path):
    base = peftops.detach(peftops.attach(moe(kind), config))
    model = peftops.attach(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    peftops.save(model, tmp_path)
    again = peftops.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_files_that_do_not_fit_say_so(tmp_path):
    model = peftops.attach(moe("Qwen3Moe"), peftops.LoRAConfig(r=2, target=["down_proj"]))
    peftops.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    fields, tensors = json.loads(path.read_text()), load_file(tmp_path / "adapter_model.safetensors")
    path.write_text(json.dumps(fields | {"target_parameters": ["experts.none"]}))
    with pytest.raises(ValueError, match=r"adapters of 1 parameters of .*experts, and its configuration means none of"):
        peftops.load(moe("Qwen3Moe"), tmp_path)
    path.write_text(json.dumps(fields))
    key = next(key for key in tensors if "lora_A" in key)
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="which do not fit 8 experts"):
        peftops.load(moe("Qwen3Moe"), tmp_path)
    target = moe("Qwen3Moe", num_experts=4)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = list(target.state_dict())
    with pytest.raises(ValueError, match="does not fit"):
        peftops.load(target, tmp_path)
    assert list(target.state_dict()) == before


@every_model
def test_checkpoints_are_read_into_codes(kind, tmp_path):
    """Most have a tensor for each expert; transformers' conversion makes a stack of them, which becomes codes."""
    dense = moe(kind)
    dense.save_pretrained(tmp_path / "dense")
    model = peftops.load_model(tmp_path / "dense")
    want = peftops.detach(peftops.attach(dense, peftops.QLoRAConfig(r=1)))
    assert torch.equal(model(ids).logits, want(ids).logits)
    summary = peftops.summary(model)
    assert summary.packed > 0.9 * summary.total
    for name, m in (("loaded", model), ("attached", want)):
        m.save_pretrained(tmp_path / name)
        again = peftops.load_model(tmp_path / name)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert peftops.summary(again).packed == summary.packed
    again = type(dense).from_pretrained(tmp_path / "loaded")
    assert torch.equal(again(ids).logits, model(ids).logits)
    model.dequantize()
    close(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "DeepseekV3"])
def test_experts_can_stay_dense(kind, tmp_path):
    moe(kind).save_pretrained(tmp_path / "dense")
    for name in ("peftops", "bitsandbytes"):
        config = peftops.NF4Config(skip=["experts"], layout=name)
        model = type(moe(kind)).from_pretrained(tmp_path / "dense", quantization_config=config)
        assert any("experts" in name for name in peftops.summary(model).left_dense)
        model.save_pretrained(tmp_path / name)
        again = peftops.load_model(tmp_path / name)
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_experts_that_bitsandbytes_quantised_one_by_one(kind, double_quant, tmp_path):
    """As checkpoints have them whose experts were linear layers then."""
    dense = moe(kind)
    dense.save_pretrained(tmp_path)
    tensors, written = load_file(tmp_path / "model.safetensors"), {}
    for key, tensor in tensors.items():
        coded = tensor.dim() == 2 and key.endswith(".weight") and ("experts." in key or "_proj" in key)
        if not coded:
            written[key] = tensor
            continue
        codes = peftops.nf4_quantize(tensor, double_quant=double_quant)
        tensors[key] = peftops.nf4_dequantize(codes)
        parts = to_bitsandbytes(codes).items()
        written |= {key.removesuffix("weight") + part: t.contiguous() for part, t in parts}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    want = peftops.load_model(tmp_path, quantize=False)
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    codes = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": codes}))
    model = peftops.load_model(tmp_path)
    summary = peftops.summary(model)
    assert summary.packed > 0.9 * summary.total
    close(model(ids).logits, want(ids).logits)
    model.hf_quantizer.quantization_config.layout = "peftops"
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(peftops.load_model(tmp_path / "again")(ids).logits, model(ids).logits)
    del written[next(key for key in written if "experts.3." in key and key.endswith(".absmax"))]
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="experts have tensors of .* that others lack"):
        peftops.load_model(tmp_path)


def test_group_codes_and_what_no_other_layout_has(tmp_path):
    dense = moe("Olmoe")
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=peftops.GroupConfig(group_size=32))
    assert type(model.model.layers[0].mlp.experts.down_proj.weight) is peftops.GroupQuantTensor
    model.save_pretrained(tmp_path / "group")
    assert torch.equal(peftops.load_model(tmp_path / "group")(ids).logits, model(ids).logits)
    for config in (peftops.GroupConfig(layout="gptq"), peftops.NF4Config(layout="bitsandbytes")):
        model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config)
        with pytest.raises(ValueError, match="is of experts, of which layout=.* has no codes"):
            model.save_pretrained(tmp_path / "other")


def test_an_adapted_model_is_written_as_its_adapter(tmp_path):
    """As Trainer writes its checkpoints: under PEFT's names of experts, and nothing of the base."""
    model = peftops.attach(moe("Qwen3Moe"), peftops.QLoRAConfig(r=2))
    model.save_pretrained(tmp_path)
    written = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert "base_model.model.model.layers.0.mlp.experts.lora_A.weight" in written
    assert all("lora_" in key for key in written)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = peftops.load(moe("Qwen3Moe"), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_stack_of_another_shape_is_refused(tmp_path):
    moe("GptOss").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.experts.down_proj"
    save_file(tensors | {key: tensors[key][:, :, :-8].contiguous()}, file, metadata={"format": "pt"})
    for quantize in (True, False):
        with pytest.raises(ValueError, match=r"down_proj.* has shape \[8, 128, 56\], the model expects \[8, 128, 64\]"):
            peftops.load_model(tmp_path, quantize=quantize)
