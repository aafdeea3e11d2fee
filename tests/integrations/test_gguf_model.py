"""Whole models as GGUF files: transformers and load_model read them back with the same logits."""

import json

import pytest
import torch

import models
import peftops
from peftops.cli import main
from peftops.integrations.gguf_model import check_gguf, write_gguf
from peftops.integrations.gguf_tokenizer import NAMES
from proves import proves

pytest.importorskip("gguf")
pytest.importorskip("transformers")
import gguf
import transformers
from tokenizers import Regex, pre_tokenizers
from tokenizers.models import BPE

ids = models.tokens()
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
split = lambda pattern: pre_tokenizers.Split(Regex(pattern), behavior="isolated")
PRE = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([split(LLAMA3), ALONE]),
    "qwen2": pre_tokenizers.Sequence([split(LLAMA3.replace("{1,3}", "")), ALONE]),
}


def tokenizer(pre="smollm"):
    made = models.tokenizer()
    pairs = [("h", "e"), ("l", "l"), ("he", "ll")]
    vocabulary = made.get_vocab() | {a + b: 259 + i for i, (a, b) in enumerate(pairs)}
    made.backend_tokenizer.model = BPE(vocabulary, pairs, unk_token="<unk>")
    if pre:
        made.backend_tokenizer.pre_tokenizer = PRE[pre]
    return made


def llama3():
    model = models.llama(tied=False)
    config = model.config
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return type(model)(config).eval()


def qwen3():
    config = models._causal("Qwen3", tie_word_embeddings=True).config
    config.head_dim = 128  # as transformers reads it, whatever a file says
    return transformers.Qwen3ForCausalLM(config).eval()


def mistral():
    return models._causal("Mistral", sliding_window=None)


BUILDS = [models.llama, lambda: models.llama(tied=False), models.qwen2, qwen3, mistral, llama3]


@proves("llama.cpp", save="models: `merge --to gguf`")
@pytest.mark.parametrize("build", BUILDS, ids=["llama", "untied", "qwen2", "qwen3", "mistral", "llama3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_readers_compute_the_same(tmp_path, build, dtype):
    model = build().to(dtype)
    write_gguf(model, tokenizer(), tmp_path / "model.gguf")
    same = type(model)(model.config).eval()  # (a model that was cast has rounded rotary frequencies)
    same.load_state_dict(model.state_dict())
    want = same(ids).logits
    readers = [lambda: peftops.load_model(tmp_path / "model.gguf", quantize=False)]
    if build is not llama3:  # whose frequencies transformers leaves out
        readers.append(lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf"))
    for read in readers:
        again = read().eval()
        assert again.dtype == torch.float32 and again.config.tie_word_embeddings == model.config.tie_word_embeddings
        torch.testing.assert_close(again(ids).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre", PRE)
def test_the_tokenizer_tells_its_name(tmp_path, pre):
    made = tokenizer(pre)
    write_gguf(models.llama(), made, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    read = lambda key: fields[f"tokenizer.{key}"].contents()
    assert (read("ggml.model"), read("ggml.pre"), read("ggml.bos_token_id")) == ("gpt2", pre, 1)
    tokens, kinds = read("ggml.tokens"), read("ggml.token_type")
    assert len(tokens) == len(kinds) == 320 and tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert kinds[:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] and tokens[-1] == "[PAD319]"
    assert read("chat_template") == made.chat_template and read("ggml.add_bos_token") is False
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again("hello, 12 times").input_ids == made("hello, 12 times").input_ids


def test_a_name_that_cannot_be_told_is_given(tmp_path):
    config, unknown = models.llama().config, tokenizer(None)
    with pytest.raises(ValueError, match="give the name of that as --gguf-pre, one of .*llama-bpe"):
        check_gguf(config, unknown)
    with pytest.raises(ValueError, match="--gguf-pre llama4x: llama.cpp has no such name"):
        check_gguf(config, unknown, "llama4x")
    check_gguf(config, unknown, "tekken")
    assert {*PRE} < {*NAMES}


def test_a_tokenizer_without_merges_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has no merges, and llama.cpp does not load a file without"):
        check_gguf(models.llama().config, models.tokenizer(), "gpt-2")


def test_what_has_no_place_is_refused_by_name():
    made = tokenizer()
    for build, message in (
        (models.gpt2, "a GGUF of gpt2 is not known here; llama, mistral, qwen2, qwen3 are"),
        (models.mistral, "sliding_window=64: llama.cpp would let mistral see all tokens"),
    ):
        with pytest.raises(TypeError, match=message):
            check_gguf(build().config, made)
    config = models.llama().config
    config.vocab_size = 200
    with pytest.raises(ValueError, match="the tokenizer has the token 261, and the model those below 200"):
        check_gguf(config, made)
    config.rope_parameters = config.rope_parameters | {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(TypeError, match="rope_type 'linear' cannot be written"):
        check_gguf(config, made)


def test_the_command(tmp_path, capsys):
    """What is merged is what is written, and ``generate`` reads it."""
    models.llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    model = peftops.attach(models.llama(), peftops.LoRAConfig(r=2))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    peftops.save(model, tmp_path / "run")
    argv = ["merge", "--model", tmp_path / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "out"]
    command = lambda *more: main([str(part) for part in [*argv, *more]])
    assert command("--gguf-pre", "qwen2") == 2 and "needs --to gguf" in capsys.readouterr().err
    assert command("--to", "gguf", "--gguf-pre", "x") == 2 and "no such name" in capsys.readouterr().err
    assert command("--to", "gguf") == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "llama"
