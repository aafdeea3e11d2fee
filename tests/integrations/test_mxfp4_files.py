"""Checkpoints of gpt-oss: the codes of its experts, as transformers reads and dequantises them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftops

GptOss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")


SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=96,
    layer_types=["sliding_attention", "full_attention"],
    pad_token_id=0,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny gpt-oss with its experts in MXFP4, laid out as the original is."""
    torch.manual_seed(0)
    config = GptOss.GptOssConfig(**SIZES, dtype="bfloat16")
    folder = tmp_path_factory.mktemp("gpt-oss")
    GptOss.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        codes = peftops.mxfp4_quantize(state.pop(name).transpose(1, 2))
        state[f"{name}_blocks"] = codes.blocks.unflatten(-1, (-1, 16)).contiguous()
        state[f"{name}_scales"] = codes.scales.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    description = json.loads((folder / "config.json").read_text())
    description["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(description))
    return folder, state


def codes_of(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, peftops.MXFP4Tensor)}


def test_a_checkpoint_is_read_trained_and_written_code_for_code(checkpoint, tmp_path):
    folder, state = checkpoint
    model, ids = peftops.load_model(folder, dtype=torch.float32), torch.arange(20).view(2, 10)
    codes = codes_of(model)
    assert len(codes) == 4
    for name, weight in codes.items():
        assert torch.equal(weight.blocks, state[name.replace(".weight", "_blocks")].flatten(-2))
        assert torch.equal(weight.scales, state[name.replace(".weight", "_scales")])
    # transformers' own way: dequantised to bf16 when it is read
    dense = GptOss.GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)

    peftops.attach(model, peftops.QLoRAConfig(r=2))  # attention becomes NF4, what is in codes stays so
    assert codes_of(model).keys() == {name.replace(".weight", ".base.weight") for name in codes}
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    factors = [p for name, p in model.named_parameters() if "experts" in name and name.endswith("lora_B")]
    assert len(factors) == 4 and all(p.grad.any() for p in factors)
    peftops.detach(model)

    again = peftops.load_model(folder)
    again.save_pretrained(tmp_path)  # as it came, for whoever has transformers
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    there = GptOss.GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float().eval()
    assert torch.equal(there(input_ids=ids).logits, dense(input_ids=ids).logits)


@pytest.mark.parametrize("layout", ["peftops", "mxfp4"])
def test_dense_files_become_codes_as_they_are_read(tmp_path, layout):
    torch.manual_seed(0)
    GptOss.GptOssForCausalLM(GptOss.GptOssConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    model = GptOss.GptOssForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=peftops.MXFP4Config(layout=layout)
    )
    codes, ids = codes_of(model), torch.arange(20).view(2, 10)
    assert len([name for name in codes if "experts" in name]) == 4 and len(codes) == 4 + 8
    if layout == "mxfp4":
        with pytest.raises(ValueError, match="q_proj.weight is of a layer other than experts, .*'mxfp4' has"):
            model.save_pretrained(tmp_path / "codes")
        return
    model.save_pretrained(tmp_path / "codes")
    again = peftops.load_model(tmp_path / "codes", dtype=torch.float32)
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_numbers_are_those_of_transformers(checkpoint):
    folder, _ = checkpoint
    dense = dict(GptOss.GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_parameters())
    rows = torch.randn(3, 64).bfloat16()
    for name, weight in codes_of(peftops.load_model(folder)).items():
        stack = dense[name.removesuffix(".weight")]
        assert torch.equal(stack.transpose(1, 2), peftops.mxfp4_dequantize(weight))
        for e, expert in enumerate(stack.detach()):
            x = rows if expert.shape[0] == 64 else rows.repeat(1, 2)[:, :96]
            torch.testing.assert_close(peftops.mxfp4_linear(x, weight[e]), x @ expert)
            assert weight[e].blocks.data_ptr() == weight.blocks.data_ptr() + e * weight.blocks[0].numel()


def test_what_is_missing_or_does_not_fit_is_named(checkpoint, tmp_path):
    folder, state = checkpoint
    name = "model.layers.0.mlp.experts.down_proj"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for change, sentence in (
        (lambda s: s.pop(f"{name}_scales"), "the tensor of the same name with _scales is missing"),
        (lambda s: s.pop(f"{name}_blocks"), "the tensor of the same name with _blocks is missing"),
        (lambda s: s.update({f"{name}_blocks": s[f"{name}_blocks"][:3].contiguous()}), "blocks must have"),
        (lambda s: s.update({f"{name}_scales": s[f"{name}_scales"].float()}), "scales must be uint8"),
    ):
        changed = dict(state)
        change(changed)
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"tensor {name}: .*{sentence}"):
            peftops.load_model(tmp_path)
