"""Tiny random models of transformers' own classes, and a tokenizer to go with them."""

import torch
from torch import nn


def mlp(bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.Tanh(), nn.Linear(96, 32, bias=bias))


def llama(seed=0, vocabulary=320, tied=True, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def tokens(rows=2, length=7, vocabulary=320, seed=0):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def tokenizer(chat=True):
    """Byte by byte, with the special tokens 0 (unknown), 1 (begin) and 2 (end)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i for i, letter in enumerate(letters, 3)}
    plain = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    result = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                     pad_token="</s>")  # fmt: skip
    if chat:
        result.chat_template = (
            "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>a:{% endif %}"
        )
    return result
