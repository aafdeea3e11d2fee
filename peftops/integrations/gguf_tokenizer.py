"""Tokenizers for GGUF files: byte-level BPE, with llama.cpp's name for the way to cut text before.

llama.cpp has the regular expressions of each such name in its code. A file has only the name.
"""

from __future__ import annotations

import json
from typing import Any

# Names of byte-level BPE that llama.cpp knows.
NAMES = (
    "bloom chatglm-bpe codeshell command-r dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default "
    "exaone exaone4 falcon falcon3 glm4 gpt-2 gpt-4o gpt3-finnish granite-docling hunyuan jais kimi-k2 lfm2 "
    "llama-bpe llama3 llama4 mellum minerva-7b mpt olmo pixtral poro-chat qwen2 qwen35 refact seed-coder smaug-bpe "
    "smollm stablelm2 starcoder superbpe tekken viking "
).split()
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXPRESSIONS = {  # that tokenizers have in front of bytes, by llama.cpp's names
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}


def add_tokenizer(writer: Any, tokenizer: Any, size: int, pre: str | None) -> None:
    """Write a fast tokenizer of transformers' for a model of ``size`` tokens; with None for a writer, only check it.

    Raises:
        TypeError: it is not a byte-level BPE.
        ValueError: it has more tokens than the model, or no merges; ``pre`` is unknown, or cannot be found.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}
    steps = _steps(parts.get("pre_tokenizer"))
    if parts.get("model", {}).get("type") != "BPE" or "ByteLevel" not in [step["type"] for step in steps]:
        raise TypeError(f"a GGUF needs a tokenizer of byte-level BPE, and {type(tokenizer).__name__} is none")
    name = _named(pre) if pre else _told(steps)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(tokens) >= size:
        raise ValueError(f"the tokenizer has the token {max(tokens)}, and the model those below {size}")
    merges = parts["model"]["merges"]
    if not merges:
        raise ValueError("the tokenizer has no merges, and llama.cpp does not load a file without")
    if writer is None:
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(_types(parts, tokens, size))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(i)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _types(parts: dict[str, Any], tokens: dict[int, str], size: int) -> list[int]:
    from gguf import TokenType

    added = {token["id"]: token["special"] for token in parts["added_tokens"]}
    kind = lambda i: TokenType.NORMAL if i in tokens else TokenType.UNUSED
    own = lambda i: TokenType.CONTROL if added[i] else TokenType.USER_DEFINED
    return [own(i) if i in added else kind(i) for i in range(size)]


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    pre_tokenizer = pre_tokenizer or {"type": None}
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _named(pre: str) -> str:
    if pre not in NAMES:
        raise ValueError(f"--gguf-pre {pre}: llama.cpp has no such name; it has {', '.join(NAMES)}")
    return pre


def _told(steps: list[dict[str, Any]]) -> str:
    """llama.cpp's name, found from the tokenizer's steps before it looks for tokens."""
    *before, last = steps
    by_bytes = last["type"] == "ByteLevel" and not last.get("add_prefix_space")
    name = None
    if by_bytes and last.get("use_regex", True):
        digits = before == [{"type": "Digits", "individual_digits": True}]
        name = "smollm" if digits else "gpt-2" if not before else None
    elif by_bytes and len(before) == 1 and before[0]["type"] == "Split" and before[0]["behavior"] == "Isolated":
        name = _EXPRESSIONS.get(before[0]["pattern"].get("Regex"))
    if name is None:
        raise ValueError(
            "the tokenizer does not tell which of llama.cpp's ways to cut text it uses; give the name of that as "
            f"--gguf-pre, one of {', '.join(NAMES)}"
        )
    return name
