"""What a weight that stands for a dense one hands out: the same as the dense one would, or a sentence."""

import copy
import io
import weakref

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
from peftops.nn import PackedLinear
from peftops.ops.packed_tensor import PackedTensor

ROWS, COLUMNS = 12, 64
WEIGHTS = {
    "nf4": lambda: peftops.nf4_quantize(torch.randn(ROWS, COLUMNS), double_quant=False),
    "nf4-double": lambda: peftops.nf4_quantize(torch.randn(ROWS, COLUMNS)),
    "group": lambda: peftops.group_quantize(torch.randn(ROWS, COLUMNS)),
    "mxfp4": lambda: peftops.mxfp4_quantize(torch.randn(ROWS, COLUMNS)),
}
every_format = pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
ONCE = [name for name in WEIGHTS if name != "nf4-double"]
one_format = pytest.mark.parametrize("make", [WEIGHTS[name] for name in ONCE], ids=ONCE)


def dense(weight):
    return weight.dequantize()


MEMORY = {
    "from_dlpack": torch.from_dlpack,
    "to_dlpack": torch.utils.dlpack.to_dlpack,
    "numpy.from_dlpack": numpy.from_dlpack,
    "numpy": lambda w: w.numpy(),
    "untyped_storage": lambda w: w.untyped_storage(),
    "storage": lambda w: w.storage(),
    "tolist": lambda w: w.tolist(),
    "view as bytes": lambda w: w.view(torch.uint8),
    "set_": lambda w: w.set_(torch.zeros(3)),
    "resize_": lambda w: w.resize_(3, 3),
    "as_strided elsewhere": lambda w: w.as_strided(w.shape, w.stride(), 64),
    "as_strided": lambda w: w.as_strided((4, 4), (4, 1)),
}


@every_format
@pytest.mark.parametrize("ask", MEMORY.values(), ids=MEMORY)
def test_memory_that_is_not_there_is_not_handed_out(make, ask):
    weight = make()
    before = dense(weight)
    with pytest.raises((NotImplementedError, RuntimeError)):
        ask(weight)
    assert weight.data_ptr() == 0 and torch.equal(dense(weight), before)


@every_format
def test_processes_share_the_parts(make):
    weight = make()
    before = dense(weight)
    assert not weight.is_shared() and weight.share_memory_() is weight and weight.is_shared()
    assert all(part.is_shared() for part in weight.parts().values()) and torch.equal(dense(weight), before)
    layer = PackedLinear.over(make(), None).share_memory()
    assert layer.weight.is_shared()


bounds = st.none() | st.integers(-2 * ROWS, 2 * ROWS)


@one_format
@given(start=bounds, stop=bounds)
def test_rows_are_those_of_the_dense_weight(make, start, stop):
    weight = make()
    part = weight[start:stop]
    assert part.shape == dense(weight)[start:stop].shape
    assert torch.equal(dense(part), dense(weight)[start:stop])


@every_format
@given(start=bounds, stop=bounds, each=st.integers(0, 2 * ROWS))
def test_what_can_be_cut_makes_sense_and_what_cannot_says_so(make, start, stop, each):
    """Scales of double quantisation stay whole: a share has the right shape, and is refused where it means nothing
    else."""
    weight = make()
    want = dense(weight)
    assert weight[start:stop].shape == want[start:stop].shape
    cuts = [
        lambda w: list(w.split(each)),
        lambda w: [w.narrow(0, start or 0, each)],
        lambda w: [w[:, start:stop]],
        lambda w: [w[start:stop:2]],
        lambda w: list(w.chunk(each or 1)),
    ]
    for cut in cuts:
        try:
            parts = cut(weight)
        except (NotImplementedError, ValueError, RuntimeError, IndexError):
            continue
        assert [part.shape for part in parts] == [part.shape for part in cut(want)]
        for part, there in zip(parts, cut(want), strict=True):
            try:
                numbers = dense(part)
            except RuntimeError:
                continue
            assert torch.equal(numbers, there)


@every_format
def test_an_empty_one_stands_for_a_float(make):
    with pytest.raises(TypeError, match="can stand for float32, bfloat16 or float16, not torch.int64"):
        torch.empty_like(make(), dtype=torch.int64)
    assert torch.empty_like(make(), dtype=torch.bfloat16).dtype == torch.bfloat16


@every_format
def test_a_layers_state_dict_is_plain_tensors(make):
    layer, other = (PackedLinear.over(make(), torch.randn(ROWS)) for _ in range(2))
    codes = f"weight.{layer.weight.PARTS[0]}"
    state = layer.state_dict()
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor} and codes in state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, COLUMNS)
    assert torch.equal(other(x), layer(x)) and other.weight is not layer.weight
    whole = {**{n: t for n, t in state.items() if not n.startswith("weight.")}, "weight": make()}
    other.load_state_dict(whole)  # as FSDP has it, and files of torch.save before there were parts
    assert torch.equal(dense(other.weight), dense(whole["weight"]))


@every_format
def test_a_state_dict_that_does_not_fit_changes_nothing(make):
    layer = PackedLinear.over(make(), None)
    before, state = dense(layer.weight), PackedLinear.over(make(), None).state_dict()
    codes = f"weight.{layer.weight.PARTS[0]}"
    for change, sentence in (
        (lambda s: s.pop(codes), 'Missing key.*"weight"'),
        (lambda s: s.update({codes: s[codes][:1]}), f"{codes} is torch.uint8 .*, not torch"),
        (lambda s: s.update({codes: s[codes].float()}), f"{codes} is torch.float32 .*, not"),
    ):
        wrong = copy.copy(state)
        change(wrong)
        with pytest.raises(RuntimeError, match=sentence):
            layer.load_state_dict(wrong)
        assert torch.equal(dense(layer.weight), before)


@every_format
def test_a_format_has_one_home(make):
    """Everything that can be done with a weight is the tensor's own, and agrees with the functions of its name."""
    weight, name = make(), make().FORMAT
    assert PackedTensor.FORMATS[name] is type(weight)
    own = lambda verb: getattr(peftops, f"{name}_{verb}")
    assert torch.equal(weight.dequantize(dtype=torch.bfloat16), own("dequantize")(weight, dtype=torch.bfloat16))
    again = weight.quantize_like(torch.randn(ROWS, COLUMNS))
    assert type(again) is type(weight) and again._layout() == weight._layout()
    x = torch.randn(3, COLUMNS)
    assert torch.equal(weight.product(x), own("linear")(x, weight))
    layer = PackedLinear.of_format(name).from_dense(torch.nn.Linear(COLUMNS, ROWS), **weight.options())
    assert layer.weight._layout() == weight._layout() and type(layer.with_codes(weight, None)) is type(layer)
    assert all(f"{option}={value}" in repr(layer) for option, value in weight.options().items())


@every_format
def test_parts_of_a_file_tell_their_format(make):
    weight = make()
    parts, shape = weight.parts(), weight.shape
    assert torch.equal(PackedTensor.from_parts(parts, shape, torch.float32), weight)
    for name, part in parts.items():
        rest = {other: p for other, p in parts.items() if other != name}
        with pytest.raises(ValueError, match="is missing"):
            PackedTensor.from_parts(rest, shape, torch.float32)
        with pytest.raises(ValueError, match=f"weight.{name} is torch.int32"):
            PackedTensor.from_parts({**parts, name: part.int()}, shape, torch.float32)
    with pytest.raises(ValueError, match="weight.more does not belong to"):
        PackedTensor.from_parts({**parts, "more": torch.zeros(1)}, shape, torch.float32)


@every_format
def test_a_weight_becomes_another_of_its_format(make):
    """It stays the same object, so that whoever holds it, even weakly, has the new numbers."""
    weight, other = make(), make().to(torch.bfloat16)
    assert weight.become(other)
    assert weight.dtype == torch.bfloat16 and torch.equal(dense(weight), dense(other))
    assert weight.become(weight)
    assert not weight.become(torch.zeros(ROWS, COLUMNS)) and not weight.become(make().to("meta"))
    assert weight.device.type == "cpu" and torch.equal(dense(weight), dense(other))


@one_format
def test_a_layer_moves_although_its_weight_is_referred_to_weakly(make):
    layer = PackedLinear.over(make(), torch.randn(ROWS))
    weight, before = layer.weight, dense(layer.weight)
    reference = weakref.ref(weight)
    layer.to("cpu").to(torch.bfloat16)
    assert layer.weight is weight is reference() and list(layer._parameters) == ["weight", "bias"]
    assert weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(dense(layer.float().weight), before)
