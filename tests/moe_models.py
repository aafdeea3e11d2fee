"""Tiny random mixtures of experts, of each way in which transformers' models keep them. Experts dominate."""

import torch

SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    tie_word_embeddings=True,
)
DEEPSEEK = dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    n_shared_experts=1,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=0,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    head_dim=8,
)
OPTIONS = {
    "Mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "Qwen2Moe": dict(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, shared_expert_intermediate_size=64
    ),
    "Qwen3Moe": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
    "DeepseekV3": DEEPSEEK,
    "GptOss": dict(num_local_experts=8, num_experts_per_tok=2),
    "Olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "Llama4": dict(num_local_experts=8, num_experts_per_tok=1, intermediate_size_mlp=64, moe_layers=[0, 1]),
}


def moe(kind: str, dtype: torch.dtype = torch.float32, **more: object) -> torch.nn.Module:
    """A model of transformers whose parameters are all random, biases too."""
    import transformers

    torch.manual_seed(0)
    name = "Llama4Text" if kind == "Llama4" else kind
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **OPTIONS[kind], **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1 if parameter.dim() > 1 else 0.5)
    return model.to(dtype).eval()
