"""AWQ checkpoints, written here by hand from the format's definition."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import peftops
from peftops.integrations.awq_files import AWQ_PARTS, from_awq, to_awq
from peftops.integrations.gptq_files import to_gptq, to_gptq_integers
from peftops.nn import GroupLinear
from proves import proves

pytest.importorskip("transformers")
PLACES = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}  # of eight outputs in a word, counted from its lowest bits


def words(codes):
    """``[rows, out]`` codes of four bits as ``[rows, out / 8]`` int32, as AutoAWQ's kernels unpack them."""
    rows, n = codes.shape
    packed = torch.zeros(rows, n // 8, dtype=torch.int64)
    for output in range(n):
        packed[:, output // 8] |= codes[:, output].long() << 4 * PLACES[output % 8]
    return (packed - ((packed >> 31) << 32)).to(torch.int32)  # the top bit is the sign


def layer(n, k, group, seed=0):
    """Random parts of a layer, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (k, n), generator=generator)
    zeros = torch.randint(0, 16, (k // group, n), generator=generator)
    scales = (torch.rand(k // group, n, generator=generator) * 0.01 + 1e-3).half()
    spread = lambda t: t.repeat_interleave(group, 0)
    dense = ((codes - spread(zeros)) * spread(scales).float()).t()
    return {"qweight": words(codes), "scales": scales, "qzeros": words(zeros)}, dense


@pytest.mark.parametrize("n, k, group", [(8, 8, 8), (16, 64, 32), (40, 256, 128), (24, 64, 64)])
def test_codes_are_read_and_written_as_they_are(n, k, group):
    parts, dense = layer(n, k, group)
    weight = from_awq(parts, torch.float32)
    assert torch.equal(peftops.group_dequantize(weight), dense)
    assert all(torch.equal(part, parts[name]) for name, part in to_awq(weight).items())


def checkpoint(folder, group=32, **how):
    """A tiny llama in AWQ, and the dense model of the same weights."""
    dense = models.llama(tied=False)
    dense.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for seed, name in enumerate(key for key in list(tensors) if key.endswith("proj.weight")):
        parts, weight = layer(*tensors.pop(name).shape, group, seed)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        dense.get_parameter(name).data.copy_(weight)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    codes = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": codes | how}))
    return dense


@proves("AutoAWQ", load="its files, code for code", train="yes", save="its files")
def test_a_checkpoint_computes_what_it_stands_for_trains_and_is_written_again(tmp_path):
    dense = checkpoint(tmp_path)
    model = peftops.load_model(tmp_path)
    assert sum(isinstance(layer, GroupLinear) for layer in model.modules()) == 14
    ids = models.tokens()
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    was, now = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert was.keys() == now.keys() and all(torch.equal(now[name], tensor) for name, tensor in was.items())
    said = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["group_size"], said["version"]) == ("awq", 32, "gemm")
    peftops.attach(model, peftops.LoRAConfig(r=2))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("how", [{"version": "gemv"}, {"bits": 3}, {"zero_point": False}], ids=str)
def test_other_versions_are_refused(tmp_path, how):
    checkpoint(tmp_path, **how)
    with pytest.raises(ValueError, match="quantised already, by awq; .* AWQ .* with version gemm"):
        peftops.load_model(tmp_path)


def test_damaged_parts_are_refused():
    parts, _ = layer(16, 64, 32)
    for bad, message in (
        ({"qweight": parts["qweight"].float()}, "qweight must be int32"),
        ({"qzeros": parts["qzeros"][:1]}, r"qzeros \[groups, 2\], not \[2, 16\] and \[1, 2\]"),
        ({"scales": parts["scales"][:, :8]}, r"scales must be \[groups, 16\]"),
        ({"scales": parts["scales"] * float("nan")}, "scales must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            from_awq({**parts, **bad})
    with pytest.raises(ValueError, match="scales is missing"):
        from_awq({name: part for name, part in parts.items() if name != "scales"})


def test_what_awq_has_no_place_for_is_refused():
    for weight, message in (
        (peftops.group_quantize(torch.randn(16, 64)), "AWQ has whole zeros from 0 to 15"),
        (peftops.group_quantize(torch.randn(16, 64), bits=8), "codes of 4 bits, eight outputs a word, not 16 outputs"),
        (peftops.group_quantize(torch.randn(12, 64)), "not 12 outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            to_awq(weight)
    with pytest.raises(ValueError, match="layout='awq' has codes of 4 bits, not 3"):
        peftops.GroupConfig(bits=3, layout="awq")


@pytest.mark.parametrize("write", [to_awq, to_gptq, to_gptq_integers], ids=["awq", "gptq", "integers"])
@pytest.mark.parametrize(
    "weight, error, message",
    [
        (peftops.nf4_quantize(torch.ones(32, 64)), TypeError, "weight must be a GroupQuantTensor, not a NF4Tensor"),
        (torch.ones(32, 64), TypeError, "weight must be a GroupQuantTensor, not a Tensor"),
        (peftops.group_quantize(torch.ones(8, 32, 64), group_size=32), ValueError, r"matri.* \[8, 32, 64\]"),
    ],
    ids=["nf4", "dense", "stack"],
)
def test_what_the_layout_has_no_place_for_is_refused(write, weight, error, message):
    with pytest.raises(error, match=message):
        write(weight)


@pytest.mark.parametrize("part", AWQ_PARTS)
def test_a_part_without_numbers_is_told_by_where_it_is(part):
    parts = {
        "qweight": torch.zeros(64, 4, dtype=torch.int32),
        "qzeros": torch.zeros(2, 4, dtype=torch.int32),
        "scales": torch.ones(2, 32),
    }
    from_awq(parts)
    with pytest.raises(ValueError, match=f"{part} must be a dense tensor, not torch.strided on meta"):
        from_awq({**parts, part: parts[part].to("meta")})
    with pytest.raises(ValueError, match=f"{part} must be a dense tensor, not a list"):
        from_awq({**parts, part: parts[part].tolist()})
    with pytest.raises(TypeError, match="can stand for float32, bfloat16 or float16, not torch.int8"):
        from_awq(parts, torch.int8)
