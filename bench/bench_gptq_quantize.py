"""Quantisers on real layers: how far weights and outputs are from the dense ones, and what each takes.

Groups by min/max (QA-LoRA's own), by least squared error and by GPTQ, and NF4 plain and by GPTQ, on layers of
SmolLM2-135M. GPTQ is calibrated on what the layers see of WordNet's training rows; the errors are those on held-out
rows. The model's file holds 4-bit weights in groups of 32, which groups of 32 would find again without an error, so
groups are of 64 here. Last, the time for a random weight of the size of a layer in a model of 7 billion parameters.
"""

import functools
import sys
import time
from pathlib import Path

import torch

import harness
import peftops
from peftops.cli.data import encode, in_order, read_rows
from peftops.cli.model import load_tokenizer
from peftops.ops.gptq_quantize import output_error

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from finetune_smollm2 import DATA, smollm2

GROUP, ROWS = 64, 128
LARGE, TOKENS = 4096, 2048
LAYERS = ["layers.0.self_attn.q_proj", "layers.15.self_attn.o_proj", "layers.15.mlp.up_proj", "layers.29.mlp.down_proj"]


@torch.no_grad()
def seen(model, tokenizer, file):
    """What each of LAYERS is given: tokens of ROWS rows, one row a token."""
    inputs = {name: [] for name in LAYERS}
    hooks = []
    for name, tokens in inputs.items():
        layer = model.get_submodule(f"model.{name}")
        hooks.append(layer.register_forward_pre_hook(lambda _, args, tokens=tokens: tokens.append(args[0][0])))
    for batch in in_order(encode(read_rows(DATA / file)[:ROWS], tokenizer, 256), 1):
        model(input_ids=torch.tensor([batch[0].ids]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in inputs.items()}


def quantisers(inputs):
    """By label, from a weight to codes."""
    ways = {}
    for bits in (4, 3, 2):
        group = functools.partial(peftops.group_quantize, bits=bits, group_size=GROUP)
        ways[f"{bits} bits  min/max"] = group
        ways[f"{bits} bits  mse"] = functools.partial(group, clip="mse")
        ways[f"{bits} bits  gptq"] = functools.partial(
            peftops.gptq_quantize, inputs=inputs, bits=bits, group_size=GROUP
        )
    return ways | nf4_quantisers(inputs)


def nf4_quantisers(inputs):
    calibrated = functools.partial(peftops.gptq_quantize, inputs=inputs, format="nf4")
    return {"NF4     plain": peftops.nf4_quantize, "NF4     gptq": calibrated}


def compare(name, weight, ways, held_out, only):
    for way, quantise in ways.items():
        label = f"{name:28} {way:15}"
        if only and only not in label:
            continue
        begin = time.perf_counter()
        codes = quantise(weight)
        seconds = time.perf_counter() - begin
        away = (codes.dequantize(dtype=torch.float32) - weight).norm() / weight.norm()
        print(f"{label} {away:8.4f} {output_error(weight, codes, held_out):8.4f} {seconds * 1e3:8.1f} ms", flush=True)


def main():
    arguments = harness.parser().parse_args()
    if arguments.device != "cpu":
        raise SystemExit("gptq_quantize: timed on the CPU alone")
    torch.set_num_threads(arguments.threads)
    model, tokenizer = peftops.load_model(smollm2(), quantize=False), load_tokenizer(smollm2())
    calibration, held_out = (seen(model, tokenizer, f"wordnet_nouns_{part}.jsonl") for part in ("train", "eval"))
    rows = len(calibration[LAYERS[0]])
    print(f"gptq_quantize: SmolLM2-135M, groups of {GROUP}, {rows} tokens to calibrate; relative errors (Frobenius)")
    print(f"{'layer':28} {'quantiser':15} {'weight':>8} {'output':>8} {'time':>11}")
    for name in LAYERS:
        weight = model.get_submodule(f"model.{name}").weight.detach()
        compare(name, weight, quantisers(calibration[name]), held_out[name], arguments.only)
    random = torch.Generator().manual_seed(0)
    few = torch.randn(LARGE // 16, LARGE, generator=random)  # inputs depend on each other, as a model's do
    inputs, others = (
        torch.randn(TOKENS, LARGE // 16, generator=random) @ few + torch.randn(TOKENS, LARGE, generator=random)
        for _ in range(2)
    )
    weight = torch.randn(LARGE, LARGE, generator=random) * 0.02
    compare(f"random {LARGE}x{LARGE}, {TOKENS} tokens", weight, nf4_quantisers(inputs), others, arguments.only)


if __name__ == "__main__":
    main()
