"""``load_model`` of whatever transformers has: it computes what the dense model does with the numbers of the codes."""

import pytest
import torch

import peftops
from peftops.nn import is_quantized

transformers = pytest.importorskip("transformers")
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_DECODERS_OWN = {"num_key_value_heads", "bos_token_id", "eos_token_id"}
ENCODER = {name: value for name, value in SIZES.items() if name not in _DECODERS_OWN}
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXT, IMAGE = {"input_ids": IDS}, {"pixel_values": PIXELS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}

MODELS = {
    "Llama": ("LlamaForCausalLM", SIZES, TEXT),
    "Mistral": ("MistralForCausalLM", SIZES, TEXT),
    "Qwen2": ("Qwen2ForCausalLM", SIZES, TEXT),
    "Qwen3": ("Qwen3ForCausalLM", SIZES, TEXT),
    "Gemma2": ("Gemma2ForCausalLM", SIZES | {"head_dim": 8}, TEXT),
    "Gemma3": ("Gemma3ForCausalLM", SIZES | {"head_dim": 8}, TEXT),
    "Phi3": ("Phi3ForCausalLM", SIZES, TEXT),
    "Olmo2": ("Olmo2ForCausalLM", SIZES, TEXT),
    "Starcoder2": ("Starcoder2ForCausalLM", SIZES, TEXT),
    "StableLm": ("StableLmForCausalLM", SIZES, TEXT),
    "Mixtral": ("MixtralForCausalLM", SIZES | EXPERTS, TEXT),
    "Qwen2Moe": ("Qwen2MoeForCausalLM", SIZES | EXPERTS | {"shared_expert_intermediate_size": 24}, TEXT),
    "Qwen3Moe": ("Qwen3MoeForCausalLM", SIZES | EXPERTS, TEXT),
    "GPTNeoX": ("GPTNeoXForCausalLM", SIZES, TEXT),
    "GPT2": (
        "GPT2LMHeadModel",
        dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
        TEXT,
    ),
    "OPT": ("OPTForCausalLM", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}, TEXT),
    "Bloom": (
        "BloomForCausalLM",
        dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        TEXT,
    ),
    "Falcon": ("FalconForCausalLM", SIZES, TEXT),
    "Bert": ("BertForMaskedLM", ENCODER, TEXT),
    "Roberta": ("RobertaForSequenceClassification", ENCODER, TEXT),
    "ModernBert": ("ModernBertForSequenceClassification", ENCODER | {"cls_token_id": 1, "sep_token_id": 2}, TEXT),
    "LlamaHead": ("LlamaForSequenceClassification", SIZES, {"input_ids": IDS}),
    "T5": (
        "T5ForConditionalGeneration",
        dict(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0),
        BOTH,
    ),
    "Bart": (
        "BartForConditionalGeneration",
        dict(
            vocab_size=96,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        ),
        BOTH,
    ),
    "ViT": ("ViTForImageClassification", VISION, IMAGE),
    "Whisper": (
        "WhisperForConditionalGeneration",
        dict(
            vocab_size=96,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        {"input_features": torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0)), "decoder_input_ids": IDS},
    ),
    "Llava": (
        "LlavaForConditionalGeneration",
        None,
        IMAGE | {"input_ids": torch.cat([torch.full((2, 4), 95), IDS.clamp(max=94)], 1)},
    ),
}


def config_of(name, kind, options):
    if name == "Llava":
        vision = transformers.CLIPVisionConfig(**VISION, projection_dim=32)
        return transformers.LlavaConfig(
            vision_config=vision,
            text_config=transformers.LlamaConfig(**SIZES),
            image_token_index=95,
            image_seq_length=4,
        )
    return kind.config_class(**options)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_numbers_that_the_codes_stand_for(tmp_path, name):
    made, options, inputs = MODELS[name]
    kind = getattr(transformers, made)
    torch.manual_seed(0)
    original = kind(config_of(name, kind, options)).eval()
    original.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    model = peftops.load_model(tmp_path / "dense")
    assert type(model) is kind and any(is_quantized(p) for p in model.parameters())
    layers = {n: p for n, p in model.named_parameters() if is_quantized(p)}
    with torch.no_grad():
        got = model(**inputs).logits
        for path, codes in layers.items():
            numbers, name = peftops.nf4_dequantize(codes), path.removesuffix(".weight")
            stack = original.get_parameter(name) if codes.dim() == 3 else None  # of experts, a parameter itself
            layer = None if codes.dim() == 3 else original.get_submodule(name)
            dense = layer.weight if stack is None else stack
            as_it_is = dense.shape == numbers.shape and type(layer).__name__ != "Conv1D"
            dense.copy_(numbers if as_it_is else numbers.mT)
        want = original(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "codes")
    with torch.no_grad():
        assert torch.equal(peftops.load_model(tmp_path / "codes")(**inputs).logits, got)
