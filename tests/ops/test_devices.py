"""Each operator says which of its tensors is on another device: a kernel would take the address at its word."""

import pytest
import torch

from operator_samples import operators, samples, written

# The CPU's own bindings, called past the dispatcher, which would hand a tensor of the meta device to the fakes.
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
OTHERS = {"index": "adapter_index", "factor": "the factor"}  # what an argument is called in words


def test_every_operator_has_a_sample():
    assert samples().keys() == operators().keys()


@pytest.mark.parametrize("name", sorted(samples()))
def test_a_tensor_on_another_device_is_named(name):
    call, arguments = operators()[name], samples()[name]
    call.redispatch(CPU, *arguments)
    tensors = [i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)]
    for i in tensors if len(tensors) > 1 else ():
        moved = [*arguments[:i], arguments[i].to("meta"), *arguments[i + 1 :]]
        argument = call._schema.arguments[i].name
        before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
        with pytest.raises(RuntimeError, match=rf"\b{OTHERS.get(argument, argument)} .*on another device"):
            call.redispatch(CPU, *moved)
        after = [value for value in arguments if isinstance(value, torch.Tensor)]
        assert all(map(torch.equal, before, after)), f"something of arguments {written(call)} was written"
