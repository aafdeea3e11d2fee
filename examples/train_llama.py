"""Seven or thirteen billion parameters on a small machine: QLoRA steps, or calibrated NF4, and the memory they take.

    python examples/train_llama.py --folder 7b                  # 14 GB of disk; --size 13b needs 26
    python examples/train_llama.py --folder 7b --calibrate      # hours on a CPU; goes on if it is run again
    python examples/train_llama.py --folder tiny --hidden 128 --layers 2 --vocabulary 1000             # seconds
    python examples/train_llama.py --folder 7b --model DIR      # a real model instead of random weights

Prints the planner's estimate beside the peak of the process, less the memory that Python and torch take alone. The
process gives freed memory back to the system at once, as the command line does.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig

import peftops
from large import anonymous, measured, write
from peftops.cli import give_blocks_back
from peftops.planner import estimate, skeleton

SIZES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}  # hidden, intermediate, layers, heads


def random_model(args: argparse.Namespace) -> Path:
    """A LLaMA with random weights, in the files that the Hub would have: one for each layer."""
    hidden, intermediate, layers, heads = SIZES[args.size]
    if args.hidden:
        hidden, intermediate, heads = args.hidden, 11 * args.hidden // 4, max(1, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=args.layers or layers,
        num_attention_heads=heads,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    h, i, words = config.hidden_size, config.intermediate_size, config.vocab_size
    ends = {"model.embed_tokens": (words, h), "lm_head": (words, h), "model.norm": (h,)}
    layer = {f"self_attn.{name}_proj": (h, h) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
    layer |= {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
    files = {"ends": {f"{name}.weight": shape for name, shape in ends.items()}}
    for number in range(config.num_hidden_layers):
        own = {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        files[f"layer-{number:03}"] = own
    with measured("write"):
        written = write(args.folder / "base", config, files)
    print(f"{written:,} parameters")
    return args.folder / "base"


def calibrate(path: Path, args: argparse.Namespace, vocabulary: int) -> None:
    """Calibrated NF4, block by block. The tokens are random: they show time and memory, not what calibration gains."""
    rows = torch.randint(vocabulary, (args.tokens // args.length, args.length)).tolist()
    show = lambda done, of: print(f"block {done} of {of}: {anonymous() / 1e9:.2f} GB", flush=True)
    with measured(f"calibrate, {args.tokens} tokens"):
        peftops.quantize_model(path, rows, dtype=torch.bfloat16, out=args.folder / "nf4", on_block=show)


def train(path: Path, args: argparse.Namespace, vocabulary: int) -> None:
    """QLoRA of all linear layers with checkpointing and 8-bit AdamW, as ``peftops plan`` estimates it."""
    config, alone = peftops.QLoRAConfig(r=args.rank), anonymous()
    shape = dict(batch=args.batch, length=args.length, checkpointing=True, optimizer="adamw8bit")
    planned = estimate(skeleton(path, dtype=torch.bfloat16), config, **shape).total
    with measured("read into NF4"):
        model = peftops.load_model(path, dtype=torch.bfloat16)
    peftops.attach(model, config)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = peftops.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for number in range(args.steps):
        ids = torch.randint(vocabulary, (args.batch, args.length))
        with measured(f"step {number + 1}, {ids.numel()} tokens"):
            total, count = peftops.language_model_loss(model, ids, ids)
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"planned: {planned / 1e9:.2f} GB, beside {alone / 1e9:.2f} GB of Python and torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a dense model; by default random weights are written")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--hidden", type=int, help="another width than the size's")
    parser.add_argument("--layers", type=int, help="another number of layers than the size's")
    parser.add_argument("--calibrate", action="store_true")
    numbers = {"vocabulary": 32000, "tokens": 8192, "batch": 1, "length": 512, "steps": 2, "rank": 16}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    give_blocks_back()
    torch.manual_seed(0)
    path = args.model or random_model(args)
    vocabulary = AutoConfig.from_pretrained(path).vocab_size
    (calibrate if args.calibrate else train)(path, args, vocabulary)


if __name__ == "__main__":
    main()
