"""QLoRA on a mixture of experts larger than memory: written with random weights, read into NF4, trained, saved, read.

    python examples/train_experts.py --folder moe   # 15 billion parameters: 30 GB of disk
    python examples/train_experts.py --folder moe --layers 2 --experts 8 --hidden 256 --intermediate 128 \\
        --vocabulary 1000                                                 # seconds

The layout is Qwen3-30B-A3B's on the Hub: bfloat16, a tensor for each matrix of each expert, a file for each layer. A
file that is there already is not written again.
"""

import argparse
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import peftops
from large import measured, write

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]  # attention and experts


def shapes(config: Qwen3MoeConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors of each file, as the Hub's checkpoints have them."""
    h, d, i = config.hidden_size, config.head_dim, config.moe_intermediate_size
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    files = {
        "ends": {
            "model.embed_tokens.weight": (config.vocab_size, h),
            "model.norm.weight": (h,),
            "lm_head.weight": (config.vocab_size, h),
        }
    }
    for layer in range(config.num_hidden_layers):
        attention = {
            "q_proj": (q, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, q),
            "q_norm": (d,),
            "k_norm": (d,),
        }
        own = {f"self_attn.{name}": shape for name, shape in attention.items()}
        own |= {"input_layernorm": (h,), "post_attention_layernorm": (h,), "mlp.gate": (config.num_experts, h)}
        for expert in range(config.num_experts):
            matrices = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
            own |= {f"mlp.experts.{expert}.{name}": shape for name, shape in matrices.items()}
        files[f"layer-{layer:03}"] = {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    for name, value in {
        "layers": 24,
        "experts": 128,
        "top-k": 8,
        "hidden": 2048,
        "intermediate": 768,
        "heads": 32,
        "kv-heads": 4,
        "vocabulary": 151936,
        "tokens": 256,
        "labels": 16,
        "rank": 4,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        moe_intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=128,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
        architectures=[Qwen3MoeForCausalLM.__name__],
    )
    with measured("write"):
        written = write(args.folder / "base", config, shapes(config))
    print(f"{written:,} parameters")
    with measured("read into NF4"):
        model = peftops.load_model(args.folder / "base", dtype=torch.bfloat16)
    with measured("attach"):
        peftops.attach(model, peftops.QLoRAConfig(r=args.rank, target=ADAPTED))
    print(peftops.summary(model))
    ids = torch.randint(args.vocabulary, (1, args.tokens))
    labels = ids.clone()
    labels[:, : -args.labels] = -100  # a prompt and its answer: on CPUs without bfloat16 the head is the slowest part
    optimizer = peftops.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    with measured(f"step of {args.tokens} tokens"):
        total, count = peftops.language_model_loss(model, ids, labels)
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with measured("save the adapter"):
        peftops.save(model, args.folder / "adapter")
    with torch.no_grad(), measured("forward"):
        want = model(ids[:, :16]).logits
    with measured("read the adapter"):
        peftops.detach(model)
        peftops.load(model, args.folder / "adapter")
    with torch.no_grad():
        same = torch.equal(model(ids[:, :16]).logits, want)
    print(f"loss {loss.item():.4f}; the adapter that was read gives the same bits: {same}")


if __name__ == "__main__":
    main()
