"""One step of AdamW with moments in 8 bits: to the bit as the reference, and what is no number stays by itself."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import sim
from peftops.ops.adamw8bit import adamw8bit_
from strategies import dtypes, normal, seeds

OPTIONS = dict(lr=0.02, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
BAD = [math.nan, math.inf, -math.inf, 1e25, -1e25, 3e38, 1e12, -1e15]
sizes = st.lists(st.sampled_from([1, 5, 31, 32, 255, 256, 300, 4095, 4096, 4097, 9001]), min_size=1, max_size=5)
blocks = st.sampled_from([32, 64, 256, 512, 4096])


def fresh(n, block):
    """Moments of a parameter of n elements; float32 ones if there is no block."""
    if block is None:
        return torch.zeros(n), torch.zeros(n)
    count = -(-n // block)
    codes = lambda: torch.zeros(count, block, dtype=torch.uint8)
    return codes(), codes(), torch.zeros(count), torch.zeros(count)


def run(device, parameters, grads, moments, block, step, **options):
    """The step in place, of copies on the device; parameters and moments after it."""
    move = lambda ts: [t.clone().to(device) for t in ts]
    lists = move(parameters), move(grads), *map(move, zip(*moments, strict=True))
    given = {} if block in (None, 256) else {"block_size": block}
    adamw8bit_(*lists, step=step, **given, **{**OPTIONS, **options})
    back = [[t.cpu() for t in ts] for ts in lists]
    return back[0], list(zip(*back[2:], strict=True))


def gradient(n, dtype, seed, bad=()):
    """Of several sizes, zeros among them."""
    torch.manual_seed(seed)
    g = normal((n,), torch.float32, seed) * 10.0 ** torch.randint(-4, 1, (n,)) * (torch.rand(n) > 0.1)
    for value in bad:
        g[torch.randint(n, ())] = value
    return g.to(dtype)


def same(got, want):
    return torch.equal(got.view(torch.uint8), want.view(torch.uint8)) or (
        got.dtype.is_floating_point and torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    )


@given(
    sizes=sizes,
    block=st.one_of(st.none(), blocks),
    dtype=dtypes,
    grad_dtype=dtypes,
    seed=seeds,
    bad=st.lists(st.sampled_from(BAD), max_size=3),
    beta1=st.sampled_from([0.0, 0.4, 0.9]),
)
def test_matches_reference_to_the_bit(device, sizes, block, dtype, grad_dtype, seed, bad, beta1):
    torch.manual_seed(seed)
    if sim.active:
        sizes = [n for n in sizes if n < 4096][:2] or [4097]
    options = {**OPTIONS, "betas": (beta1, 0.999)}
    parameters, moments = [normal((n,), dtype, seed) for n in sizes], [fresh(n, block) for n in sizes]
    for step in (1, 2, 3):
        grads = [gradient(n, grad_dtype, seed + step, bad if step == 2 else ()) for n in sizes]
        got, got_moments = run(device, parameters, grads, moments, block, step, betas=options["betas"])
        for i, (p, g) in enumerate(zip(parameters, grads, strict=True)):
            want, want_moments = reference.adamw8bit(p, g, moments[i], block or 256, step, **options)
            assert same(got[i], want)
            assert all(map(same, got_moments[i], want_moments))
        parameters, moments = got, got_moments


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_an_interval_and_its_value_the_middle(signed):
    """Of the reference, which the kernels equal: the map of bitsandbytes to rounding, each number within half of its
    interval, each value its own code. (Where an interval ends is rounded: its index is below 256, in float32, so to
    2^-16 of an interval at each of two operations.)"""
    torch.manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8)
    values, map_ = reference.dynamic_decode(codes, signed), reference.dynamic_map(signed)
    assert ((values - map_).abs() <= 1e-6 * map_.abs()).all() and values[-1] == 1
    assert torch.equal(reference.dynamic_encode(values, torch.ones(()), signed), codes)
    x = torch.cat([torch.linspace(-1, 1, 100001), torch.rand(10000) * 10.0 ** torch.randint(-7, 1, (10000,))])
    x = x if signed else x.abs()
    back = reference.dynamic_decode(reference.dynamic_encode(x, torch.ones(()), signed), signed)
    e = (x.abs().double()[:, None] * (1 + 1e-5) > 10.0 ** torch.arange(-6, 0)).sum(1)
    half = 0.45 * 10.0 ** (e - 6) / 2 ** (e + (not signed))
    assert ((back - x).abs() <= half * (1 + 4 * 2**-16) + 1e-7 * (e == 0)).all()


def test_the_first_step_is_adamws(device):
    """To a few roundings of what is added, in torch's own words."""
    p, g = normal((5000,), torch.float32, 1), normal((5000,), torch.float32, 2)
    (got,), _ = run(device, [p], [g], [fresh(5000, 256)], 256, 1)
    theirs = torch.nn.Parameter(p.clone())
    theirs.grad = g
    torch.optim.AdamW([theirs], **OPTIONS).step()
    assert ((got - theirs).abs() <= 4 * 2**-24 * (p.abs() + OPTIONS["lr"])).all()


@pytest.mark.parametrize("block", [None, 32, 256, 4096])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_number_or_huge_touches_its_own_element_alone(device, bad, block):
    """The others get the very bits that they get where that gradient is zero; itself goes the way of AdamW's."""
    n, at, ends = 4096 + 300, 1000, []
    p = normal((n,), torch.float32, 0)
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], **OPTIONS)
    for value in (bad, 0.0):
        parameters, moments = [p], [fresh(n, block)]
        for step in range(1, 6):
            g = gradient(n, torch.float32, step)
            g[at] = value if step == 2 else 0.0 if step == 1 else 0.5
            if step > 2 and not value:
                g[at] = 0.0
            before = parameters[0][at].clone()
            parameters, moments = run(device, parameters, [g], moments, block, step)
            if value:
                theirs.grad = g
                optimizer.step()
                was = before
        ends.append(parameters[0])
    others = torch.arange(n) != at
    assert torch.equal(ends[0][others], ends[1][others])
    ours, want = ends[0][at], theirs.detach()[at]
    assert ours.isfinite() == want.isfinite()
    if abs(bad) == 1e25 or bad == 3e38:  # its second moment is infinite: it only decays
        assert ours == was * torch.tensor(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])


def test_a_block_of_huge_gradients_alone_still_moves(device):
    p = torch.zeros(256)
    parameters, moments = [p], [fresh(256, 256)]
    for step in range(1, 4):
        parameters, moments = run(device, parameters, [torch.full((256,), 1e14)], moments, 256, step, weight_decay=0.0)
        moved = (parameters[0] - p).abs()
        assert ((moved > 0) & (moved < 4 * OPTIONS["lr"])).all()
        p = parameters[0]


def test_views_that_are_not_aligned(device):
    """As a slice of a flat buffer is."""
    n = 700
    whole = [normal((n + 3,), torch.float32, seed) for seed in (0, 1)]
    results = []
    for cut in (lambda t: t[3:].clone(), lambda t: t[3:]):
        p, g = (cut(t.clone().to(device)) for t in whole)
        first, second = (cut(torch.zeros(768 + 3, dtype=torch.uint8, device=device)) for _ in range(2))
        absmax = [torch.zeros(3, device=device) for _ in range(2)]
        for step in (1, 2):
            adamw8bit_([p], [g], [first], [second], *[[t] for t in absmax], block_size=256, step=step, **OPTIONS)
        results.append([t.cpu() for t in (p, first, second, *absmax)])
    assert all(map(torch.equal, *results))


def test_many_tensors_are_one_call(device):
    """More than one launch has room for on CUDA, some of them empty."""
    sizes = [7, 0, 300, *[33] * 110, 0]
    parameters = [normal((n,), torch.float32, i) for i, n in enumerate(sizes)]
    grads = [gradient(n, torch.float32, i) if n else torch.zeros(0) for i, n in enumerate(sizes)]
    got, moments = run(device, parameters, grads, [fresh(n, 32) for n in sizes], 32, 1)
    for i, n in enumerate(sizes):
        (alone,), (its,) = run(device, [parameters[i]], [grads[i]], [fresh(n, 32)], 32, 1)
        assert torch.equal(alone, got[i]) and all(map(torch.equal, its, moments[i]))
    adamw8bit_([], [], [], [], step=1, **OPTIONS)


def test_same_bits_for_any_number_of_threads(device, threads):
    parameters = [normal((n,), torch.float32, n) for n in (400_000, 77, 131_073)]
    grads = [gradient(p.numel(), torch.float32, 1) for p in parameters]
    runs = []
    for n in (1, 2, 3):
        threads(n)
        p, moments = run(device, parameters, grads, [fresh(p.numel(), 256) for p in parameters], 256, 1)
        runs.append([*p, *(t for ts in moments for t in ts)])
    assert all(all(map(torch.equal, runs[0], one)) for one in runs)


def arguments(device, n=300, block=32):
    first, second, *absmax = (t.to(device) for t in fresh(n, block))
    p, g = (normal((n,), torch.float32, seed).to(device) for seed in (0, 1))
    return dict(
        parameters=[p],
        grads=[g],
        exp_avg=[first],
        exp_avg_sq=[second],
        exp_avg_absmax=[absmax[0]],
        exp_avg_sq_absmax=[absmax[1]],
        block_size=block,
        step=1,
        **OPTIONS,
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grads": []}, "grads must be 1 tensors, as the parameters are, not 0"),
        ({"exp_avg_absmax": []}, "exp_avg_absmax must be 1 tensors"),
        ({"block_size": 48}, "block_size must be a power of two from 32 to 4096, not 48"),
        ({"step": 0}, "step must be 1 or more, not 0"),
        ({"grads": [torch.zeros(300, dtype=torch.float64)]}, "grads must be float32, bfloat16 or float16, not Double"),
        ({"grads": [torch.zeros(299)]}, "grads must have 300 elements, not 299"),
        ({"grads": [torch.zeros(600)[::2]]}, r"grads must be contiguous, its shape is \[300\]"),
        (
            {"parameters": [torch.zeros(300, dtype=torch.int32)]},
            "parameters must be float32, bfloat16 or float16, not Int",
        ),
        ({"exp_avg": [torch.zeros(300)]}, "exp_avg must be Byte, not Float"),
        ({"exp_avg_sq": [torch.zeros(300, dtype=torch.uint8)]}, "exp_avg_sq must have 320 elements, not 300"),
        ({"exp_avg_sq_absmax": [torch.zeros(9)]}, "exp_avg_sq_absmax must have 10 elements, not 9"),
    ],
)
def test_bad_arguments(device, change, message):
    given = arguments(device)
    before = given["parameters"][0].clone()
    # (.to would lay a strided tensor out anew)
    like = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)
    change = {k: [like(t) for t in v] if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(RuntimeError, match=f"^adamw8bit: {message}"):
        adamw8bit_(**{**given, **change})
    assert torch.equal(before, given["parameters"][0])


def test_registration(device):
    values = list(arguments(device).values())
    lr, betas, eps, decay = values[8:]
    torch.library.opcheck(torch.ops.peftops.adamw8bit_.default, (*values[:8], lr, *betas, eps, decay))


def test_it_compiles():
    """(The optimizer's own step is left out of graphs: a number that changes would be another graph.)"""
    compiled, eager = arguments("cpu"), arguments("cpu")
    torch.compile(lambda: adamw8bit_(**compiled), backend="aot_eager", fullgraph=True)()
    adamw8bit_(**eager)
    names = "parameters", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"
    assert all(torch.equal(compiled[name][0], eager[name][0]) for name in names)
