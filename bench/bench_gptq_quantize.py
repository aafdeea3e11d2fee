"""Three quantisers on real layers: how far weights and outputs are from the dense ones, and what each takes.

Min/max (QA-LoRA's own), least squared error per group, and GPTQ, on layers of SmolLM2-135M. GPTQ is calibrated on
what the layers see of WordNet's training rows; the errors are those on held-out rows. The model's file holds 4-bit
weights in groups of 32, which groups of 32 would find again without an error, so groups are of 64 here.
"""

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


def main():
    arguments = harness.parser().parse_args()
    if arguments.device != "cpu":
        raise SystemExit("gptq_quantize: timed on the CPU alone")
    torch.set_num_threads(arguments.threads)
    model, tokenizer = peftops.load_model(smollm2(), quantize=False), load_tokenizer(smollm2())
    calibration, held_out = (seen(model, tokenizer, f"wordnet_nouns_{part}.jsonl") for part in ("train", "eval"))
    rows = len(calibration[LAYERS[0]])
    print(f"gptq_quantize: SmolLM2-135M, groups of {GROUP}, {rows} tokens to calibrate; relative errors (Frobenius)")
    print(f"{'layer':28} {'bits':4}  {'quantiser':8} {'weight':>8} {'output':>8} {'time':>9}")
    for name in LAYERS:
        weight = model.get_submodule(f"model.{name}").weight.detach()
        for bits in (4, 3, 2):
            for quantizer in ("min/max", "mse", "gptq"):
                label = f"{name:28} {bits:4}  {quantizer:8}"
                if arguments.only and arguments.only not in label:
                    continue
                begin = time.perf_counter()
                if quantizer == "gptq":
                    quantized = peftops.gptq_quantize(weight, calibration[name], bits=bits, group_size=GROUP)
                else:
                    clip = "mse" if quantizer == "mse" else "none"
                    quantized = peftops.group_quantize(weight, bits=bits, group_size=GROUP, clip=clip)
                seconds = time.perf_counter() - begin
                away = (peftops.group_dequantize(quantized) - weight).norm() / weight.norm()
                output = output_error(weight, quantized, held_out[name])
                print(f"{label} {away:8.4f} {output:8.4f} {seconds * 1e3:6.1f} ms", flush=True)


if __name__ == "__main__":
    main()
