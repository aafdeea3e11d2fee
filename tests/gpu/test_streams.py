"""Every operator where only a GPU can fail it: captured into a CUDA graph, on a side stream, beside another call, and
twice over. Samples are small; the sums of large ones are in test_sizes.py."""

import pytest
import torch

from operator_samples import on_gpu, operators, samples, tensors_of, written

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
NAMES = sorted(operators())
WAIT = 20_000_000  # clocks, some 10 ms: long enough for the host to be far ahead


@pytest.fixture(params=NAMES)
def call(request):
    torch.manual_seed(0)
    operator = operators()[request.param]
    arguments = on_gpu(operator, samples()[request.param])

    def run(values=arguments):
        result = operator(*values)
        results = result if isinstance(result, (tuple, list)) else (result,)
        return tensors_of([*results, *(values[i] for i in written(operator))])

    run.arguments = arguments
    run.floats = [t for t in tensors_of(arguments) if t.is_cuda and t.is_floating_point()]
    return run


def contents(call, seed):
    """Other contents for the buffers of a call; scales stay positive."""
    draw = torch.Generator(device="cuda").manual_seed(seed)
    return [torch.rand(t.shape, generator=draw, device="cuda").to(t.dtype) + 0.5 for t in call.floats]


def fill(call, values):
    for buffer, value in zip(call.floats, values, strict=True):
        buffer.copy_(value)


def same(got, want):
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def alone(call, values):
    """The results for such contents, by itself on the default stream; copies."""
    fill(call, values)
    results = [t.clone() for t in call()]
    torch.cuda.synchronize()
    return results


def test_a_graph_replays_with_other_contents(call):
    wants = [alone(call, contents(call, seed)) for seed in range(3)]
    fill(call, contents(call, 0))
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        results = call()
    # A capture must not hold on to memory that is given to others afterwards, pinned or not.
    others = [torch.full((1 << 10,), 255, dtype=torch.uint8, pin_memory=True) for _ in range(64)]
    for seed in (1, 2, 0):
        fill(call, contents(call, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert same(results, wants[seed])
    del others


def test_a_side_stream_is_the_one_that_is_used(call):
    """The contents arrive late, on a stream that the default one does not wait for."""
    want, fresh = alone(call, contents(call, 1)), contents(call, 1)
    fill(call, contents(call, 2))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(WAIT)
        fill(call, fresh)
        results = call()
    side.synchronize()
    assert same(results, want)


def test_two_streams_at_once(call):
    """Two calls that run side by side share no working memory."""
    values = [contents(call, seed) for seed in (1, 2)]
    wants = [alone(call, value) for value in values]
    streams = [torch.cuda.Stream() for _ in range(2)]
    copy = lambda value: list(map(copy, value)) if isinstance(value, list) else of_gpu(value)
    of_gpu = lambda value: value.clone() if isinstance(value, torch.Tensor) and value.is_cuda else value
    copies = [list(map(copy, call.arguments)) for _ in values]
    floats = [[t for t in tensors_of(given) if t.is_cuda and t.is_floating_point()] for given in copies]
    for _ in range(5):
        for buffers, value in zip(floats, values, strict=True):
            for buffer, v in zip(buffers, value, strict=True):
                buffer.copy_(v)
        torch.cuda.synchronize()
        results = []
        for stream, arguments in zip(streams, copies, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(arguments))
        torch.cuda.synchronize()
        assert all(same(got, want) for got, want in zip(results, wants, strict=True))


def test_nothing_waits_for_the_gpu(call):
    """The host enqueues and goes on; multi_lora and all."""
    fill(call, contents(call, 1))
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(WAIT)
        call()
        done = torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert not done, "the operator waited for what was enqueued before it"
