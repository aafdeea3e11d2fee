"""What bench/gpu.py measures in its own process: functions that return what goes into a JSON file.

Times are those of CUDA graphs, so no host time is in them, and inputs rotate through more memory than the L2 cache
holds, so every call finds its weight in memory, as a model's layers do.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

import peftops

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096))
ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
R = 16
BF16 = torch.bfloat16
ROTATED = 160 << 20  # bytes of weights that a graph goes through: three times the L2 cache of an H100
CALLS = 8  # in a graph, at least


# How layers multiply: PEFTOPS_NF4_LIBRARY and PEFTOPS_NF4_WGMMA.
WAYS = {"auto": ("auto", "auto"), "kernels": ("never", "off"), "library": ("always", "off"), "wgmma": ("never", "on")}


@contextmanager
def way(name: str) -> Iterator[None]:
    """Meanwhile layers multiply in one of the ways."""
    values = dict(zip(("PEFTOPS_NF4_LIBRARY", "PEFTOPS_NF4_WGMMA"), WAYS[name], strict=True))
    old = {variable: os.environ.get(variable) for variable in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for variable, value in old.items():
            os.environ.pop(variable)
            if value is not None:
                os.environ[variable] = value


class Replay:
    """A graph of calls. ``calls`` are made on one stream before the capture as well, to warm up."""

    def __init__(self, calls: list[Callable[[], object]], stream: torch.cuda.Stream):
        self.count = len(calls)
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for call in calls:
                call()

    def microseconds(self) -> float:
        """Of one call, in one replay."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / self.count


def time_all(
    providers: dict[str, list[Callable[[], object]]], rounds: int = 5, stream: torch.cuda.Stream | None = None
) -> dict[str, float]:
    """Median microseconds of a call of each provider, replayed in turns; a word in place of what cannot be captured."""
    stream, replays = stream or torch.cuda.Stream(), {}
    for name, calls in providers.items():
        try:
            replays[name] = Replay(calls, stream)
        except RuntimeError as error:
            print(f"    {name}: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in replays}
    for replay in replays.values():
        replay.microseconds()
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(replay.microseconds())
    return {name: statistics.median(of) for name, of in times.items()}


def spread(bytes_each: int) -> int:
    """How many copies of something rotate."""
    return max(2, -(-ROTATED // max(bytes_each, 1 << 20)))


def rotate(make: Callable[[int], Callable[[], object]], copies: int) -> list[Callable[[], object]]:
    calls = [make(i) for i in range(copies)]
    return [calls[i % copies] for i in range(max(copies, CALLS))]


def in_way(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with way(name):
            return call()

    return run


def linear4bit(weight: torch.Tensor) -> nn.Module | None:
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    kind = dict(quant_type="nf4", compress_statistics=True)
    layer = bnb.nn.Linear4bit(*weight.T.shape, bias=False, compute_dtype=weight.dtype, **kind)
    layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, **kind)
    return layer.cuda().eval()


def products(rows: tuple[int, ...] = ROWS) -> dict:
    """nf4_linear in its ways, the dense product, dequantising first, and bitsandbytes; forward, and backward of a layer
    with an adapter of rank 16 in float32."""
    torch.manual_seed(0)
    records = []
    for n, k in SHAPES:
        dense = [(0.02 * torch.randn(n, k, device="cuda")).to(BF16) for _ in range(spread(2 * n * k))]
        ours = [peftops.nf4_quantize(dense[0]) for _ in range(spread(n * k // 2))]
        theirs = [linear4bit(dense[0]) for _ in range(spread(n * k // 2))]
        A, B = torch.randn(R, k, device="cuda").requires_grad_(), torch.randn(n, R, device="cuda").requires_grad_()
        exact = peftops.nf4_dequantize(ours[0], dtype=torch.float32).double()
        for m in rows:
            us, error = forward(m, n, k, dense, ours, theirs, exact)
            records.append(dict(direction="forward", m=m, n=n, k=k, us=us, error=error))
            records.append(dict(direction="backward", m=m, n=n, k=k, us=backward(m, n, k, A, B, dense, ours, theirs)))
            print(records[-2], records[-1], sep="\n", flush=True)
        del dense, ours, theirs, exact
        torch.cuda.empty_cache()
    return {"records": records}


@torch.no_grad()
def forward(m, n, k, dense, ours, theirs, exact) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds, and errors against float64 of the quantised weight: root of the mean square, relative."""
    x = torch.randn(m, k, device="cuda").to(BF16)
    calls = {
        "peftops": lambda i: in_way("auto", lambda: peftops.nf4_linear(x, ours[i])),
        "kernels": lambda i: in_way("kernels", lambda: peftops.nf4_linear(x, ours[i])),
        "wgmma": lambda i: in_way("wgmma", lambda: peftops.nf4_linear(x, ours[i])),
        "library": lambda i: in_way("library", lambda: peftops.nf4_linear(x, ours[i])),
        "dequantise + cuBLAS": lambda i: lambda: F.linear(x, peftops.nf4_dequantize(ours[i])),
        "bitsandbytes": lambda i: lambda: theirs[i](x),
        "dense": lambda i: lambda: F.linear(x, dense[i]),
    }
    if theirs[0] is None:
        del calls["bitsandbytes"]
    if m < 16 or torch.cuda.get_device_capability() != (9, 0):
        del calls["wgmma"]
    us = time_all({name: rotate(call, len(dense if name == "dense" else ours)) for name, call in calls.items()})
    want = x.double() @ exact.T
    of = lambda y: float((y.double() - want).square().mean().sqrt() / want.square().mean().sqrt())
    return us, {name: of(call(0)()) for name, call in calls.items() if name != "dense"}


def backward(m, n, k, A, B, dense, ours, theirs) -> dict[str, float]:
    """Microseconds for the gradients of x, A and B."""
    x = torch.randn(m, k, device="cuda").to(BF16).requires_grad_()
    g = torch.randn(m, n, device="cuda").to(BF16)
    stream = torch.cuda.Stream()

    def composed(base):  # as PEFT has it
        return base + F.linear(F.linear(x.to(A.dtype), A), B).to(base.dtype) * 2.0

    def adapted(weight):
        return peftops.nf4_linear(x, weight, lora_A=A, lora_B=B, scaling=2.0)

    layers = {
        "peftops": (adapted, ours),
        "kernels": (in_way_of("kernels", adapted), ours),
        "library": (in_way_of("library", adapted), ours),
        "bitsandbytes": (lambda layer: composed(layer(x)), theirs),
        "dense": (lambda weight: composed(F.linear(x, weight)), dense),
    }
    ways = {"kernels": "kernels", "library": "library"}
    gradient = lambda y: torch.autograd.grad(y, (x, A, B), g, retain_graph=True)
    replays, kept = {}, []
    for name, (layer, weights) in layers.items():
        if weights[0] is None:
            continue
        with torch.cuda.stream(stream):
            outputs = [layer(weight) for weight in weights]
        calls = [in_way(ways.get(name, "auto"), lambda y=y: gradient(y)) for y in outputs]
        try:
            replays[name] = Replay(rotate(calls.__getitem__, len(calls)), stream)
        except RuntimeError as error:
            print(f"    backward {name}: {str(error).splitlines()[0]}", flush=True)
        kept.append(outputs)  # a graph reads what they saved
    times: dict[str, list[float]] = {name: [] for name in replays}
    for round in range(4):
        for name, replay in replays.items():
            us = replay.microseconds()
            if round:
                times[name].append(us)
    return {name: statistics.median(of) for name, of in times.items()}


def in_way_of(name: str, layer: Callable) -> Callable:
    def run(weight):
        with way(name):
            return layer(weight)

    return run


def others() -> dict:
    """Quantise, dequantise, group-quantised layers, parts of LoRA, float32, 8-bit AdamW; each with what a user would do
    without it. The operators themselves: a public function may look at a result, and so wait for it."""
    torch.manual_seed(0)
    n = k = 4096
    dense = [(0.02 * torch.randn(n, k, device="cuda")).to(BF16) for _ in range(spread(2 * n * k))]
    packed = [peftops.nf4_quantize(w) for w in dense]
    records = [*copies(), *conversions(dense, packed)]
    for bits in (4, 2, 3, 8):
        groups = [peftops.group_quantize(w, bits=bits) for w in dense]
        size = groups[0].nbytes + dense[0].nbytes
        records += case(
            f"group_dequantize {bits} bits", size, peftops=[lambda w=w: peftops.group_dequantize(w) for w in groups] * 2
        )
        for m in (1, 16, 64, 256, 1024, 4096) if bits in (3, 4) else (16, 1024):
            records += group_layers(m, bits, groups, dense)
    for m in (1, 64, 512, 4096):
        records += thin_products(m, k)
    for m in (16, 1024):
        records += float32_layers(m, packed, dense)
    return {"records": records + optimizers()}


@torch.no_grad()
def case(
    label: str, moved: int = 0, stream: torch.cuda.Stream | None = None, **providers: list[Callable[[], object]]
) -> list[dict]:
    record = dict(label=label, us=time_all(providers, stream=stream), **({"bytes": moved} if moved else {}))
    print(record, flush=True)
    return [record]


def copies() -> list[dict]:
    source = [torch.empty(64 << 20, dtype=torch.int8, device="cuda") for _ in range(4)]
    target = [torch.empty_like(t) for t in source]
    return case("copy of 64 MiB", 128 << 20, copy=[lambda i=i: target[i].copy_(source[i]) for i in range(4)] * 2)


def conversions(dense, packed) -> list[dict]:
    size = packed[0].nbytes + dense[0].nbytes
    theirs = {"quantize": {}, "dequantize": {}}
    try:
        import bitsandbytes.functional as bnb

        states = [bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in dense]
        theirs["dequantize"] = {"bitsandbytes": [lambda w=w: bnb.dequantize_4bit(*w) for w in states] * 2}
        theirs["quantize"] = {"bitsandbytes": [lambda w=w: bnb.quantize_4bit(w, quant_type="nf4") for w in dense] * 2}
    except ImportError:
        pass
    quantize = [lambda w=w: torch.ops.peftops.nf4_quantize(w, 64) for w in dense] * 2
    dequantize = [lambda w=w: peftops.nf4_dequantize(w) for w in packed] * 2
    return [
        *case("nf4_dequantize 4096x4096 bf16", size, peftops=dequantize, **theirs["dequantize"]),
        *case("nf4_quantize 4096x4096 bf16", size, peftops=quantize, **theirs["quantize"]),
    ]


def group_layers(m, bits, groups, dense) -> list[dict]:
    n, k = dense[0].shape
    x, g = torch.randn(m, k, device="cuda", dtype=BF16), torch.randn(m, n, device="cuda", dtype=BF16)
    step = torch.ops.peftops.group_linear_backward
    return [
        *case(
            f"group_linear {bits} bits M={m}",
            peftops=[lambda w=w: peftops.group_linear(x, w) for w in groups] * 2,
            dequantised=[lambda w=w: F.linear(x, peftops.group_dequantize(w)) for w in groups] * 2,
            dense=[lambda w=w: F.linear(x, w) for w in dense] * 2,
        ),
        *case(
            f"group_linear_backward {bits} bits M={m}",
            peftops=[lambda w=w: step(g, *w._arguments, None, None) for w in groups],
            dequantised=[lambda w=w: g @ peftops.group_dequantize(w) for w in groups],
            dense=[lambda w=w: g @ w for w in dense],
        ),
    ]


def thin_products(m: int, k: int) -> list[dict]:
    copies = max(2, (64 << 20) // (2 * m * k)) if m > 64 else 8
    x = [torch.randn(m, k, device="cuda", dtype=BF16) for _ in range(copies)]
    A, u = torch.randn(R, k, device="cuda"), torch.randn(m, R, device="cuda")
    A16, u16, ops = A.to(BF16), u.to(BF16), torch.ops.peftops
    return [
        *case(
            f"lora_shrink M={m} r={R}",
            peftops=[lambda t=t: ops.lora_shrink(t, A, True, 1.0, 0.0, None) for t in x],
            torch_bf16=[lambda t=t: t @ A16.T for t in x],
            torch_fp32=[lambda t=t: t.float() @ A.T for t in x],
        ),
        *case(
            f"lora_expand_ M={m} r={R}",
            peftops=[lambda t=t: ops.lora_expand_(t, u, A, True, 1.0, 0.0, None) for t in x],
            torch_bf16=[lambda t=t: t.addmm_(u16, A16) for t in x],
        ),
        *case(
            f"lora_gradient M={m} r={R}",
            peftops=[lambda t=t: ops.lora_gradient(u, t, torch.float32, True, 1.0, 0.0, None) for t in x],
            torch_bf16=[lambda t=t: u16.T @ t for t in x],
            torch_fp32=[lambda t=t: u.T @ t.float() for t in x],
        ),
    ]


def float32_layers(m, packed, dense) -> list[dict]:
    x = torch.randn(m, dense[0].shape[1], device="cuda")
    return case(
        f"nf4_linear float32 M={m}",
        kernels=[in_way("kernels", lambda w=w: peftops.nf4_linear(x, w)) for w in packed],
        library=[in_way("library", lambda w=w: peftops.nf4_linear(x, w)) for w in packed],
        dense=[lambda w=w: F.linear(x, w.float()) for w in dense],
    )


def optimizers() -> list[dict]:
    """A step over 40 million LoRA parameters, 448 tensors, as it is called: from Python, host time and all."""
    shapes = [(R, 4096), (4096, R)] * 224 + [(4096, 4096)]
    makers = {"peftops.AdamW8bit": peftops.AdamW8bit, "torch fused AdamW": lambda p: torch.optim.AdamW(p, fused=True)}
    try:
        import bitsandbytes as bnb

        makers["bitsandbytes AdamW8bit"] = bnb.optim.AdamW8bit
    except ImportError:
        pass
    us = {}
    for name, make in makers.items():
        parameters = [torch.randn(s, device="cuda", requires_grad=True) for s in shapes]
        optimizer = make(parameters)
        for p in parameters:
            p.grad = torch.randn_like(p)
        samples = []
        for _ in range(8):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            samples.append((time.perf_counter() - begin) * 1e6)
        us[name] = statistics.median(samples[2:])
    record = dict(label="optimizer step, 46 million fp32 parameters in 449 tensors", us=us)
    print(record, flush=True)
    return [record]


def host() -> dict:
    """Microseconds of the host for a call, on shapes so small that the GPU is never behind."""
    n = k = 64
    weight = peftops.nf4_quantize(torch.randn(n, k, device="cuda", dtype=BF16))
    dense = torch.randn(n, k, device="cuda", dtype=BF16)
    x = torch.randn(1, k, device="cuda", dtype=BF16)
    A, B = (torch.randn(s, device="cuda", requires_grad=True) for s in ((R, k), (n, R)))
    rows = 64
    pool = peftops.AdapterPool({"layer": (k, n)}, pages=rows * 9, page_size=1024, slots=rows, device="cuda")
    for i in range(rows):
        pool.add(str(i), {"layer": (torch.randn(R, k), torch.randn(n, R))})
    index = torch.tensor([pool.pin(str(i)) for i in range(rows)])
    layer, many = pool.layer("layer"), torch.randn(rows, k, device="cuda")
    theirs = linear4bit(dense)
    calls = {
        "F.linear": lambda: F.linear(x, dense),
        "nf4_linear": lambda: peftops.nf4_linear(x, weight),
        "nf4_linear with an adapter": lambda: peftops.nf4_linear(x, weight, lora_A=A, lora_B=B),
        "multi_lora_linear, 64 adapters": lambda: peftops.multi_lora_linear(many, weight, layer, index),
    }
    if theirs is not None:
        calls["bitsandbytes Linear4bit"] = lambda: theirs(x)
    result = {}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for name, call in calls.items():
                for _ in range(100):
                    call()
                samples = []
                for _ in range(5):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    for _ in range(200):
                        call()
                    samples.append((time.perf_counter() - begin) / 200 * 1e6)
                    torch.cuda.synchronize()
                result[name + (", grad" if grad else "")] = statistics.median(samples)
    return result


def launches() -> dict:
    """A launch of each main kernel, for a profiler to look at."""
    torch.manual_seed(0)
    n = k = 4096
    weight = peftops.nf4_quantize((0.02 * torch.randn(n, k, device="cuda")).to(BF16))
    group = peftops.group_quantize((0.02 * torch.randn(n, k, device="cuda")).to(BF16))
    with torch.no_grad():
        peftops.nf4_dequantize(weight)
        hopper = torch.cuda.get_device_capability() == (9, 0)
        products = {"kernels": (1, 16, 64, 256, 1024), "library": (256,), "wgmma": (64, 256, 1024) if hopper else ()}
        for name, rows in products.items():
            for m in rows:
                x = torch.randn(m, k, device="cuda", dtype=BF16)
                with way(name):
                    peftops.nf4_linear(x, weight)
        for m in (64, 1024):
            g = torch.randn(m, n, device="cuda", dtype=BF16)
            torch.ops.peftops.nf4_linear_backward(g, *weight._arguments, k, None, None, 0.0, None)
            peftops.group_linear(torch.randn(m, k, device="cuda", dtype=BF16), group)
        x, A = torch.randn(512, k, device="cuda", dtype=BF16), torch.randn(R, k, device="cuda")
        torch.ops.peftops.lora_shrink(x, A, True, 1.0, 0.0, None)
        torch.ops.peftops.lora_gradient(torch.randn(512, R, device="cuda"), x, torch.float32, True, 1.0, 0.0, None)
    torch.cuda.synchronize()
    return {}
