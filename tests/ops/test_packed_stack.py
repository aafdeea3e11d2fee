"""Stacks of packed weights [experts, out, in]: one weight in a format, of which each expert is a weight of its own."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import peftops
from peftops import GroupQuantTensor, NF4Tensor
from peftops.ops.group_tensor import pack_bits, unpack_bits

E, N, K = 3, 64, 256  # an expert's absmax values fill a block of 256
MAKE = {
    "nf4": lambda w: peftops.nf4_quantize(w, double_quant=False),
    "nf4-double": peftops.nf4_quantize,
    "nf4-32": lambda w: peftops.nf4_quantize(w, block_size=32),
    "group": peftops.group_quantize,
    "group-3": lambda w: peftops.group_quantize(w, bits=3, group_size=64),
}
every_format = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def dense(weight):
    return (peftops.nf4_dequantize if isinstance(weight, NF4Tensor) else peftops.group_dequantize)(weight)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_what_its_rows_are(make, dtype):
    w = torch.randn(E, N, K).to(dtype)
    stack, flat = make(w), make(w.flatten(0, 1))
    assert (stack.shape, stack.dtype, stack.nbytes) == (w.shape, dtype, flat.nbytes)
    assert dense(stack).shape == w.shape and torch.equal(dense(stack), dense(flat).view(E, N, K))
    for name, part in stack.parts().items():
        assert torch.equal(part.flatten(), getattr(flat, name).flatten())


@every_format
def test_an_expert_is_a_view(make):
    stack = make(torch.randn(E, N, K))
    for e in (*range(E), -1):
        expert = stack[e]
        assert type(expert) is type(stack) and expert.shape == (N, K)
        assert torch.equal(dense(expert), dense(stack)[e])
        for name in stack.BY_ROW:
            begin, size = getattr(stack, name).data_ptr(), getattr(expert, name).nbytes
            assert getattr(expert, name).data_ptr() == begin + e % E * size
        assert torch.equal(
            peftops.nf4_linear(torch.eye(K), expert)
            if isinstance(stack, NF4Tensor)
            else peftops.group_linear(torch.eye(K), expert),
            dense(expert).T,
        )
    for e in (E, -E - 1):
        with pytest.raises(IndexError, match=f"index {e} is out of"):
            stack[e]
        with pytest.raises(IndexError):
            torch.select(stack, 0, e)


@pytest.mark.parametrize("n, k, double, group", [(3, 32, False, 64), (7, 9, False, 64), (64, 64, True, 16384)])
def test_experts_that_share_a_block_have_no_view(n, k, double, group):
    w = torch.randn(2, n, k)
    stack = peftops.nf4_quantize(w, double_quant=double)
    with pytest.raises(ValueError, match=f"blocks of {group} elements share .* and {n * k} are no multiple"):
        stack[1]
    assert torch.equal(dense(stack), dense(peftops.nf4_quantize(w.flatten(), double_quant=double)).view(w.shape))


@every_format
def test_it_survives_copying_pickling_saving_and_loading(make):
    model, fresh = (nn.ParameterDict({"weight": nn.Parameter(make(torch.randn(E, N, K)), False)}) for _ in range(2))
    want = dense(model["weight"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(dense(other["weight"]), want)
        assert other["weight"].packed.data_ptr() != model["weight"].packed.data_ptr()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    fresh.load_state_dict(loaded)
    assert torch.equal(loaded["weight"], model["weight"].data) and torch.equal(dense(fresh["weight"]), want)
    model.to(torch.bfloat16)
    assert model["weight"].dtype == torch.bfloat16 and model["weight"].shape == (E, N, K)
    moved = model.to("meta")["weight"]
    assert moved.shape == (E, N, K) and moved.packed.device.type == "meta"


@every_format
def test_other_operations_raise_a_sentence(make):
    stack = make(torch.randn(E, N, K))
    for operation in (lambda w: w * 2, lambda w: w.sum(), lambda w: w.transpose(1, 2), lambda w: w[0, 1]):
        with pytest.raises(NotImplementedError, match=f"does not work on {stack.NAME}"):
            operation(stack)


def test_codes_of_a_stack():
    codes, scales, zeros = torch.randint(0, 8, (E, N, K)), torch.rand(E, N, K // 32) + 0.5, torch.rand(E, N, K // 32)
    stack = GroupQuantTensor.from_codes(codes, scales, zeros, bits=3)
    assert stack.shape == (E, N, K) and torch.equal(stack.codes, codes.to(torch.uint8))
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3), codes.to(torch.uint8))
    for e in range(E):
        one = GroupQuantTensor.from_codes(codes[e], scales[e], zeros[e], bits=3)
        assert torch.equal(one, stack[e])
    with pytest.raises(ValueError, match=rf"scales must have shape \[{E}, {N}, groups\]"):
        GroupQuantTensor.from_codes(codes, scales[0], zeros, bits=3)
    with pytest.raises(ValueError, match=r"codes must be integers \[out, in\] or \[experts, out, in\]"):
        GroupQuantTensor.from_codes(codes[0, 0], scales, zeros, bits=3)


@every_format
def test_a_stack_is_sharded_by_expert(make):
    stack = make(torch.randn(4, N, K))
    shards = torch.split(stack, 2)
    assert [s.shape for s in shards] == [(2, N, K)] * 2
    parts = [torch.cat([getattr(s, name) for s in shards]) for name in stack.BY_ROW]
    assert torch.equal(stack.with_parts(dict(zip(stack.BY_ROW, parts, strict=True)), stack.shape), stack)
