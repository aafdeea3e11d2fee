"""LongLoRA's cost in training, forward and backward, against full attention: of the attention alone, and of a step."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import peftops
from harness import Case, parser, run
from peftops.nn.shifted_attention import ShiftedAttention


class Module(torch.nn.Module):
    """What an attention function asks of its module."""

    is_causal, num_key_value_groups = True, 1


def attention(tokens: int) -> Case:
    heads, width = 2, 32
    q, k, v = (torch.randn(1, heads, tokens, width, requires_grad=True) for _ in range(3))
    attend, module = ShiftedAttention(None, True), Module()

    def ours() -> None:
        attend(sdpa_attention_forward, module, q, k, v)[0].sum().backward()

    def full() -> None:
        sdpa_attention_forward(module, q, k, v, None)[0].sum().backward()

    # A causal pair costs two products of `width` forward and five backward.
    pairs = sum((tokens // 4) ** 2 * share for share in (4, 3 + 2 / 4)) / 2 * (heads // 2)
    return Case(f"attention, {tokens} tokens, 2 heads of 32", {"peftops": ours, "full": full}, flops=14 * width * pairs)


def step(tokens: int) -> Case:
    """One step of a small LLaMA: what attention saves shows next to all else."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
    )
    torch.manual_seed(0)
    ids = torch.randint(64, (1, tokens))

    def of(config_: object) -> object:
        model = peftops.attach(LlamaForCausalLM(config), config_).train()

        def call() -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        return call

    ours = peftops.LongLoRAConfig(extras=False)
    full = peftops.LoRAConfig(r=8, target=["q_proj", "k_proj", "v_proj", "o_proj"])
    return Case(f"step of a layer, {tokens} tokens", {"peftops": of(ours), "full": of(full)})


if __name__ == "__main__":
    arguments = parser()
    arguments.set_defaults(rounds=3)
    run("LongLoRA", (make(tokens) for make in (attention, step) for tokens in (4096, 8192)), arguments)
