"""What each operator says: which of its tensors is on another device, as a kernel would take the address at its word;
and no more than a sentence."""

import re

import pytest
import torch

from operator_samples import operators, samples, tensors_of, written

# The CPU's own bindings, called past the dispatcher, which would hand a tensor of the meta device to the fakes.
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
OTHERS = {"index": "adapter_index", "factor": "the factor"}  # what an argument is called in words


def test_every_operator_has_a_sample():
    without = samples().keys() ^ operators().keys()
    assert not without, f"tests/operator_samples.py and csrc/ops/library.cpp differ in {sorted(without)}"


def with_tensors(arguments, change):
    """For each argument that is a tensor or a list of them: its place, and all arguments with it changed."""
    for i, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) or (isinstance(value, list) and value):
            new = [change(t) for t in value] if isinstance(value, list) else change(value)
            yield i, [*arguments[:i], new, *arguments[i + 1 :]]


@pytest.mark.parametrize("name", sorted(samples()))
def test_a_tensor_on_another_device_is_named(name):
    call, arguments = operators()[name], samples()[name]
    call.redispatch(CPU, *arguments)
    tensors = tensors_of(arguments)
    for i, moved in with_tensors(arguments, lambda t: t.to("meta")) if len(tensors) > 1 else ():
        argument = call._schema.arguments[i].name
        before = [t.clone() for t in tensors]
        with pytest.raises(RuntimeError, match=rf"\b{OTHERS.get(argument, argument)} .*on another device"):
            call.redispatch(CPU, *moved)
        assert all(map(torch.equal, before, tensors)), f"something of arguments {written(call)} was written"


WRONG = {
    "a dtype that nobody takes": lambda t: t.to(torch.complex64),
    "more dims": lambda t: t[None, None, None],
    "no element": lambda t: t.flatten()[:0],
}


@pytest.mark.parametrize("name", sorted(samples()))
def test_an_error_is_a_sentence_and_no_place_in_the_source(name):
    call, raised = operators()[name], 0
    for change in WRONG.values():
        for _, wrong in with_tensors(samples()[name], change):
            try:
                call.redispatch(CPU, *wrong)
            except RuntimeError as error:
                text = str(error)
                assert re.match(r"[a-z][\w ]*: \w", text) and not re.search(r"csrc|\w\.(h|cpp):", text), text
                raised += 1
    assert raised
