import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from gguf_file import write_gguf
from peftops.integrations.bitsandbytes_files import from_bitsandbytes, to_bitsandbytes
from peftops.nn import NF4Linear
from proves import proves

ids = models.tokens()


@pytest.fixture
def dense(tmp_path):
    model = models.llama(tied=False)
    model.save_pretrained(tmp_path / "dense")
    return model, tmp_path / "dense"


def quantized(model):
    """The same by hand."""
    return peftops.detach(peftops.attach(model, peftops.QLoRAConfig()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_safetensors_into_4_bits(tmp_path, tied, dtype):
    from transformers import LlamaForCausalLM

    models.llama(tied=tied, dtype=dtype).save_pretrained(tmp_path)
    model = peftops.load_model(tmp_path, dtype=dtype)
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14 and type(model.lm_head) is nn.Linear
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    want = quantized(LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    assert torch.equal(model(ids).logits, want(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_reads_a_dense_model_as_transformers_does(dense):
    original, folder = dense
    model = peftops.load_model(folder, quantize=False)
    assert torch.equal(model(ids).logits, original(ids).logits)


def test_reads_several_files(tmp_path):
    original = models.llama(tied=False)
    original.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(peftops.load_model(tmp_path, quantize=False)(ids).logits, original(ids).logits)


def test_options_reach_the_quantiser(dense):
    model = peftops.load_model(dense[1], block_size=128, double_quant=False)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.block_size == 128 and not weight.double_quant


def test_a_bias_is_kept(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    original = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    nn.init.normal_(original.model.layers[0].self_attn.q_proj.bias)
    original.save_pretrained(tmp_path)
    model = peftops.load_model(tmp_path)
    assert isinstance(model.model.layers[0].self_attn.q_proj, NF4Linear)
    assert torch.equal(model(ids).logits, quantized(original)(ids).logits)


def test_reads_what_bitsandbytes_quantised(tmp_path):
    """Its checkpoints hold six tensors per weight; ours are the same bits."""
    original = quantized(models.llama(tied=False))
    tensors = {name: p.detach() for name, p in original.named_parameters()}
    for name, layer in original.named_modules():
        if isinstance(layer, NF4Linear):
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{key}": t.contiguous() for key, t in to_bitsandbytes(layer.weight).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = original.config.to_dict()
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = peftops.load_model(tmp_path)
    assert torch.equal(model(ids).logits, original(ids).logits)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantised already, by gptq"):
        peftops.load_model(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_file_stays_mapped(tmp_path, quantize, dtype):
    """A norm that is a part of its file would keep all of that in memory."""
    models.llama(tied=False).save_pretrained(tmp_path)
    model = peftops.load_model(tmp_path, dtype=dtype, quantize=quantize)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    bnb = tmp_path / "bnb"
    bnb.mkdir()
    if quantize:
        tensors = dict(model.named_parameters())
        for name, layer in model.named_modules():
            if isinstance(layer, NF4Linear):
                del tensors[f"{name}.weight"]
                tensors |= {f"{name}.{key}": t.contiguous() for key, t in to_bitsandbytes(layer.weight).items()}
        save_file(tensors, bnb / "model.safetensors")
        config = {
            **model.config.to_dict(),
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        }
        (bnb / "config.json").write_text(json.dumps(config, default=str))
        again = peftops.load_model(bnb, dtype=dtype)
        assert str(bnb) not in Path("/proc/self/maps").read_text()
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_peftops_is_imported_where_tensors_are_made_elsewhere():
    code = """
        import torch
        torch.set_default_device("meta")
        import peftops
        from peftops.integrations.bitsandbytes_files import from_bitsandbytes, to_bitsandbytes
        weight = peftops.nf4_quantize(torch.randn(8, 64, device="cpu"))
        assert torch.equal(from_bitsandbytes(to_bitsandbytes(weight)), weight)
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("kw", [{}, {"double_quant": False}, {"block_size": 256}], ids=str)
def test_bitsandbytes_tensors_round_trip(kw):
    weight = peftops.nf4_quantize(torch.randn(33, 100).bfloat16(), **kw)
    tensors = to_bitsandbytes(weight)
    back = from_bitsandbytes(tensors)
    assert torch.equal(back, weight) and (back.dtype, back.shape) == (weight.dtype, weight.shape)
    with pytest.raises(ValueError, match="weight.absmax is missing"):
        from_bitsandbytes({k: v for k, v in tensors.items() if k != "weight.absmax"})
    state = "weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(ValueError, match="is damaged"):
        from_bitsandbytes({**tensors, state: tensors[state][:-3]})
    with pytest.raises(ValueError, match="quant_map is not the one"):
        from_bitsandbytes({**tensors, "weight.quant_map": torch.zeros(16)})
    for part in ("absmax", "nested_absmax") if kw.get("double_quant", True) else ("absmax",):
        with pytest.raises(ValueError, match=f"weight.{part} must be .*, not torch.bool"):
            from_bitsandbytes({**tensors, f"weight.{part}": tensors[f"weight.{part}"].bool()})


@pytest.fixture
def llama_gguf(tmp_path):
    pytest.importorskip("gguf")
    model = models.llama(tied=False)
    write_gguf(tmp_path / "model.gguf", model)
    return model, tmp_path


@proves("llama.cpp", load="GGUF")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_reads_gguf(llama_gguf, what):
    original, folder = llama_gguf
    path = folder / "model.gguf" if what == "file" else folder
    dense = peftops.load_model(path, quantize=False)
    torch.testing.assert_close(dense(ids).logits, original(ids).logits, rtol=0.02, atol=0.02)  # Q8_0 in the MLP
    attention = original.model.layers[1].self_attn
    assert torch.equal(dense.model.layers[1].self_attn.k_proj.weight, attention.k_proj.weight)
    assert torch.equal(dense.model.layers[1].self_attn.q_proj.weight, attention.q_proj.weight)
    model = peftops.load_model(path)
    assert torch.equal(model(ids).logits, quantized(dense)(ids).logits)


def test_reads_a_gemma3_from_gguf(tmp_path):
    """As transformers does; its norms add 1 to their weights, and a layer sees all tokens or a window of them."""
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GgufConfig

    pytest.importorskip("gguf")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma3TextConfig(**sizes, head_dim=8, num_hidden_layers=7, vocab_size=320, sliding_window=4)
    original = Gemma3ForCausalLM(config).eval()
    for name, weight in original.named_parameters():
        torch.nn.init.normal_(weight, std=0.5 if "norm" in name else 0.02)
    write_gguf(tmp_path / "model.gguf", original, "gemma3")
    dense = peftops.load_model(tmp_path, quantize=False)
    assert dense.config.layer_types == original.config.layer_types and dense.config.sliding_window == 4
    torch.testing.assert_close(dense(ids).logits, original(ids).logits, rtol=0.02, atol=0.02)  # Q8_0 in the MLP
    codes = GgufConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", quantization_config=codes)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), theirs.parameters(), strict=True))


def llama3_factors(theta, width, factor):
    """By what each frequency is divided in Llama 3.1, as llama.cpp writes it."""
    factors = []
    for frequency in 1 / theta ** (np.arange(0, width, 2) / width):
        length = 2 * np.pi / frequency
        smooth = (8192 / length - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if length < 8192 / 4 else factor if length > 8192 else between)
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_frequencies_of_a_gguf_are_used(tmp_path, factor):
    from transformers import LlamaConfig, LlamaForCausalLM

    pytest.importorskip("gguf")
    config = models.llama(tied=False).config.to_dict() | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    }
    original = LlamaForCausalLM(LlamaConfig(**config))
    write_gguf(tmp_path / "model.gguf", original, factors=llama3_factors(5e5, 16, factor))
    model = peftops.load_model(tmp_path, quantize=False)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    model.save_pretrained(tmp_path / "again")
    again = peftops.load_model(tmp_path / "again", quantize=False)
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_factors_of_one_change_nothing_and_others_are_refused(tmp_path):
    pytest.importorskip("gguf")
    original = models.llama(tied=False)
    write_gguf(tmp_path / "model.gguf", original, factors=[1.0] * 8)
    model = peftops.load_model(tmp_path, quantize=False)
    assert torch.equal(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
    for factors in ([1.0] * 7 + [2.5], [1.0] * 3 + [8.0]):
        write_gguf(tmp_path / "model.gguf", original, factors=factors)
        with pytest.raises(ValueError, match="rope_freqs.weight, which are not those of Llama 3.1"):
            peftops.load_model(tmp_path)


def test_scaled_positions_of_a_gguf_are_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", models.llama(tied=False), scaling=gguf.RopeScalingType.YARN)
    with pytest.raises(ValueError, match="scales rotary positions .yarn."):
        peftops.load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_frequencies_of_old_files_are_compared(dense, dtype):
    original, folder = dense
    file, own = folder / "model.safetensors", original.model.rotary_emb.inv_freq
    tensors, key = load_file(file), "model.layers.{}.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {key.format(i): own.to(dtype).clone() for i in range(2)}, file)
    model = peftops.load_model(folder, quantize=False)
    assert torch.equal(model(ids).logits, original(ids).logits)
    for other in (own * 0.9, own[:4].clone()):
        save_file(tensors | {key.format(0): other.to(dtype)}, file)
        with pytest.raises(ValueError, match="inv_freq has other rotary frequencies than"):
            peftops.load_model(folder)


def test_a_damaged_gguf_raises(llama_gguf):
    _, folder = llama_gguf
    data = (folder / "model.gguf").read_bytes()
    for cut in (2, 60, len(data) // 2):
        (folder / "model.gguf").write_bytes(data[:cut])
        with pytest.raises(ValueError):
            peftops.load_model(folder)
    (folder / "model.gguf").write_bytes(b"not a GGUF at all" * 100)
    with pytest.raises(ValueError):
        peftops.load_model(folder)


def test_bad_models(tmp_path, dense):
    with pytest.raises(FileNotFoundError, match="no model at .*: neither a GGUF file nor a directory with config.json"):
        peftops.load_model(tmp_path / "nowhere")
    _, folder = dense
    file = folder / "model.safetensors"
    tensors = load_file(file)

    def expect(message, change):
        changed = dict(tensors)
        change(changed)
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            peftops.load_model(folder)

    expect("lacks 1 tensors, among them model.norm.weight", lambda t: t.pop("model.norm.weight"))
    expect(
        "lacks 1 tensors, among them model.layers.0.mlp.up_proj.weight",
        lambda t: t.pop("model.layers.0.mlp.up_proj.weight"),
    )
    expect(
        "has a tensor model.extra that LlamaForCausalLM has no place for",
        lambda t: t.update({"model.extra": torch.ones(1)}),
    )
    expect(
        r"tensor model.norm.weight has shape \[3\], the model expects \[64\]",
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
    )
    expect(
        "holds a NaN or an infinity",
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.full((96, 64), float("nan"))}),
    )
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        peftops.load_model(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors in .*; pytorch_model.bin is not read"):
        peftops.load_model(folder)


def dense_reader(folder):
    peftops.load_model(folder, quantize=False)


def calibrating_reader(folder):
    peftops.quantize_model(folder, [torch.arange(3, 35)] * 32)


@pytest.mark.filterwarnings("ignore:1024 tokens are few")
@pytest.mark.parametrize(
    "reader, codes",
    [(peftops.load_model, False), (peftops.load_model, True), (dense_reader, False), (calibrating_reader, False)],
)
def test_integers_are_no_weights(tmp_path, reader, codes):
    model = quantized(models.llama(tied=False)) if codes else models.llama(tied=False)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    dense = [name for name in tensors if name.endswith(".weight")]
    assert len(dense) == (7 if codes else 21)
    for name in dense:
        save_file(tensors | {name: tensors[name].view(torch.int32)}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{name}.* has dtype torch.int32, the model expects floating-point"):
            reader(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_4_bit_model_and_one_tensor(tmp_path):
    """In a process of its own: a model of 190 MB in float32, most of it linear layers of 8 MB each."""
    script = textwrap.dedent("""
        import sys, threading, time, torch, peftops
        from transformers import LlamaConfig, LlamaForCausalLM
        folder, make = sys.argv[1:]
        config = LlamaConfig(vocab_size=500, hidden_size=1024, intermediate_size=2048, num_hidden_layers=5,
                             num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
        if make == "make":
            LlamaForCausalLM(config).save_pretrained(folder)
            raise SystemExit
        anonymous = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
        LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1))
        start, peak, stop = anonymous(), [0], []
        def watch():
            while not stop:
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.0005)
        thread = threading.Thread(target=watch); thread.start()
        model = peftops.load_model(folder)
        stop.append(1); thread.join()
        size = sum(p.nbytes for p in model.parameters())
        print(peak[0] - start, size)
    """)
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run([*command, "make"], check=True, capture_output=True)
    output = subprocess.run([*command, "load"], check=True, capture_output=True, text=True).stdout.split()
    growth, size = map(int, output)
    file = (tmp_path / "model.safetensors").stat().st_size
    layer = 4 * 1024 * 2048
    assert size < file / 6
    assert growth < size + 2 * layer + (16 << 20), f"{growth / 2**20:.0f} MiB for a model of {size / 2**20:.0f} MiB"
