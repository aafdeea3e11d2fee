"""Models that other libraries have made: bitsandbytes' layers become ours, and PEFT's adapters run on them."""

import copy
import warnings

import pytest
import torch
from torch import nn

import models
import peftops
from peftops.nn import NF4Linear, is_quantized
from proves import proves

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
ids = models.tokens()


def dense(tmp_path, dtype=torch.float32):
    """Its rows are whole blocks: bitsandbytes 0.50 decodes others wrongly on CPUs with AVX-512."""
    models.llama(dtype=dtype, inner=128).save_pretrained(tmp_path)
    return tmp_path


def theirs(tmp_path, quant_type="nf4", double=True):
    pytest.importorskip("bitsandbytes")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(dense(tmp_path), quantization_config=how)


def ours(tmp_path, **options):
    config = peftops.NF4Config(**options)
    return transformers.AutoModelForCausalLM.from_pretrained(dense(tmp_path), quantization_config=config)


def with_lora(model, name="default", **options):
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in model.named_parameters():
        if "lora_" in key and f".{name}." in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model):
    """In training mode, where nothing is dropped: in eval mode, bitsandbytes packs its weights anew on some CPUs, with
    scales in bfloat16."""
    training = model.training
    with torch.no_grad():
        result = model.train()(input_ids=ids).logits
    model.train(training)
    return result


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_layers_become_ours_without_a_copy(tmp_path, double):
    model = theirs(tmp_path, double=double)
    before, where = logits(model), {n: m.weight.data_ptr() for n, m in model.named_modules() if "proj" in n}
    assert peftops.from_bitsandbytes(model) is model
    assert {n for n, m in model.named_modules() if isinstance(m, NF4Linear)} == set(where)
    assert all(model.get_submodule(n).weight.packed.data_ptr() == pointer for n, pointer in where.items())
    assert all(model.get_submodule(n).weight.double_quant == double for n in where)
    close(logits(model), before)
    model.save_pretrained(tmp_path / "again")
    close(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")), before)  # bitsandbytes' again
    close(logits(peftops.load_model(tmp_path / "again")), before)


def test_adapters_around_them_stay(tmp_path):
    model = with_lora(with_lora(theirs(tmp_path)), "other")
    adapters = {key: p for key, p in model.named_parameters() if "lora_" in key}
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = logits(model)
    peftops.from_bitsandbytes(model)
    own = dict(model.named_parameters())
    assert all(own[key] is p for key, p in adapters.items())
    for name, want in wanted.items():
        model.set_adapter(name)
        close(logits(model), want)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == (".other." in key) for key, p in adapters.items())


def test_adapters_on_their_layers_are_refused_with_the_way(tmp_path):
    model = theirs(tmp_path)
    for target, error in (("all-linear", ValueError), (["q_proj"], TypeError)):
        with pytest.raises(error, match=r"Linear4bit.*; peftops.from_bitsandbytes\(model\) makes ours of its layers"):
            peftops.attach(model, peftops.LoRAConfig(r=2, target=target))
    peftops.attach(peftops.from_bitsandbytes(model), peftops.LoRAConfig(r=2))


def test_what_cannot_become_ours_says_so_and_stays(tmp_path):
    model = theirs(tmp_path, quant_type="fp4")
    before = logits(model)
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj: its weight is in FP4, and only NF4"):
        peftops.from_bitsandbytes(model)
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="a LlamaForCausalLM has no Linear4bit of bitsandbytes"):
        peftops.from_bitsandbytes(models.llama())
    bnb = pytest.importorskip("bitsandbytes")
    layer = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", device="meta"))
    with pytest.raises(ValueError, match="0: its weight is not quantised yet"):
        peftops.from_bitsandbytes(layer)


@pytest.mark.parametrize("double", [True, False])
def test_what_a_cpu_packed_for_inference_is_undone(tmp_path, double):
    """Only some CPUs do that, but the code that does is plain Python. The scales are rounded to bfloat16 then."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(packed, False, quant_state=state, quant_type="nf4", bnb_quantized=True)
    want = peftops.from_bitsandbytes(nn.Sequential(copy.deepcopy(layer)))[0].weight
    convert = getattr(functional, "_convert_weight_packed_for_cpu", None)
    if convert is None:
        pytest.skip("this bitsandbytes packs nothing")
    layer.weight.data, layer.weight.quant_state = convert(packed, state)
    got = peftops.from_bitsandbytes(nn.Sequential(layer))[0].weight
    assert torch.equal(got.packed, want.packed) and not got.double_quant and got.dtype == torch.float32
    assert torch.equal(got.absmax, want.absmax.bfloat16().float())


@proves("HF PEFT on our layers", load="its adapters", train="fused", save="its format")
@pytest.mark.parametrize("layout", ["nf4", "group"])
def test_pefts_lora_runs_the_fused_operator(tmp_path, layout):
    config = peftops.NF4Config() if layout == "nf4" else peftops.GroupConfig()
    kind = transformers.AutoModelForCausalLM
    base = kind.from_pretrained(dense(tmp_path), quantization_config=config)
    plain = copy.deepcopy(base).dequantize()
    model, other = with_lora(base), with_lora(plain)
    operators = []
    with _Record(operators):
        got = logits(model)
    name = "nf4_linear" if layout == "nf4" else "group_linear"
    assert sum(name in op for op in operators) == 14
    close(got, logits(other))
    for m in (model, other):
        m.train()(input_ids=ids, labels=ids).loss.backward()
    grads = {key: p.grad for key, p in other.named_parameters() if p.grad is not None}
    mine = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == mine.keys() and grads
    for key, grad in grads.items():
        torch.testing.assert_close(mine[key], grad, rtol=1e-3, atol=1e-4)


class _Record(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, into):
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.into.append(str(func))
        return func(*args, **(kwargs or {}))


def test_several_adapters_switched_off_mixed_and_merged(tmp_path):
    base = ours(tmp_path)
    bare = logits(base)
    other = with_lora(with_lora(copy.deepcopy(base).dequantize()), "other")
    model = with_lora(with_lora(base), "other")
    for active in ("default", "other"):
        for m in (model, other):
            m.set_adapter(active)
        close(logits(model), logits(other))
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    for m in (model, other):
        m.base_model.set_adapter(["default", "other"])
    close(logits(model), logits(other))
    with torch.no_grad():
        mixed = [m(input_ids=ids, adapter_names=["default", "other"]).logits for m in (model, other)]
    close(*mixed)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type="linear")
    other.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", combination_type="linear")
    for m in (model, other):
        m.set_adapter("both")
    close(logits(model), logits(other))
    before = {n: p for n, p in model.named_parameters() if is_quantized(p)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.merge_adapter()
    assert any("quantising it again errs by" in str(w.message) for w in caught)
    merged = logits(model)
    model.unmerge_adapter()
    assert all(p is before[n] for n, p in model.named_parameters() if is_quantized(p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = model.merge_and_unload()
    assert torch.equal(logits(alone), merged) and sum(isinstance(m, NF4Linear) for m in alone.modules()) == 14


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora needs the numbers .* peftops.DoRAConfig"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is subtracted from the numbers"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is subtracted from the numbers"),
    ],
    ids=str,
)
def test_what_peft_cannot_do_on_codes_is_refused_by_its_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        with_lora(ours(tmp_path), **options)


def test_prepare_model_for_kbit_training(tmp_path):
    """PEFT casts whatever it does not know to float32; codes then stand for float32, and stay what they are."""
    dense(tmp_path, torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=peftops.NF4Config()
    )
    codes = [p.packed for p in model.parameters() if is_quantized(p)]
    model = peft.prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(a, p.packed) for a, p in zip(codes, filter(is_quantized, model.parameters()), strict=True))
    assert with_lora(model).train()(input_ids=ids, labels=ids).loss.isfinite()
