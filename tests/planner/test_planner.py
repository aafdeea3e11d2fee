"""What is estimated on the meta device is what the same step allocates on real tensors, for every method."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

import models
import peftops
from examples import example_of
from peftops.attaching import METHODS
from peftops.planner import TABLE, WANTS, Estimate, choose, estimate, estimate_all, skeleton, trace
from peftops.planner.choose import TASKS

NAMES = {adapter.__name__.lower(): config for config, adapter in METHODS.items()}


def config_of(name):
    """Options that fit a tiny model, those of the laws."""
    return example_of(NAMES[name]).config


@functools.cache
def folder_of(build, root):
    folder = root / build.__name__
    build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def allocated(folder, config, batch, length, checkpointing=False):
    """What a real step takes: weights, what trains and its moments, and all that its operations hold at once."""
    torch.manual_seed(0)
    model = peftops.attach(AutoModelForCausalLM.from_pretrained(folder), config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = models.tokens(batch, length)
    for _ in range(2):
        with trace.Ledger([*model.parameters(), *model.buffers(), ids]) as ledger:
            peftops.language_model_loss(model, ids, ids)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = sum(part.nbytes for p in model.parameters() if not p.requires_grad for part in trace.parts_of(p))
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    fixed = frozen + sum(b.nbytes for b in model.buffers())
    return fixed, sum(p.nbytes for p in trained) + moments, ledger.peak


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_ledger_counts_what_lives(device):
    floats = lambda n: torch.empty(n, device=device)
    old, codes = floats(1000), peftops.nf4_quantize(torch.ones(64, 64, device=device))
    with trace.Ledger([old, codes]) as ledger:
        a = floats(100)
        assert ledger.live == 400
        b = a.view(10, 10)  # the same storage
        b += old[:10]
        assert ledger.live == 400
        c = a + 1
        assert ledger.live == 800 == ledger.peak
        del a, b
        assert ledger.live == 400 and ledger.peak == 800
        del c
        codes.detach(), old.view(10, 100)
        d = floats(50)
    assert ledger.live == d.nbytes == 200 and ledger.peak == 800


@pytest.mark.parametrize("name", sorted(NAMES))
def test_estimates_are_what_is_allocated(name, root):
    build = models.qwen2 if name == "bitfit" else models.llama
    folder = folder_of(build, root)
    got = estimate(skeleton(folder), config_of(name), batch=3, length=40)
    if "does not read" in (got.why_not or ""):
        pytest.skip(got.why_not)
    assert got.why_not is None and got.method == name
    weights, optimizer, peak = allocated(folder, config_of(name), 3, 40)
    # (Which formats LQ-LoRA chooses depends on the weights; what they take together, on its budget.)
    assert got.weights == pytest.approx(weights, rel=0.02 if name == "lqlora" else 0)
    assert got.optimizer == optimizer
    assert got.activations == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("build", [models.gpt2, models.mistral, models.gemma], ids=lambda build: build.__name__)
def test_on_other_architectures(build, root):
    folder = folder_of(build, root)
    got = estimate(skeleton(folder), peftops.LoRAConfig(r=8), batch=2, length=48)
    assert got.activations == pytest.approx(allocated(folder, peftops.LoRAConfig(r=8), 2, 48)[2], rel=0.03)


def test_checkpointing_is_counted(root):
    folder = folder_of(models.llama, root)
    model, config = skeleton(folder), peftops.LoRAConfig(r=8)
    got = estimate(model, config, batch=8, length=64, checkpointing=True)
    assert got.activations == pytest.approx(allocated(folder, config, 8, 64, checkpointing=True)[2], rel=0.03)
    assert got.activations < 0.8 * estimate(model, config, batch=8, length=64).activations


def test_moments_in_8_bits_are_counted(root):
    folder, config = folder_of(models.llama, root), peftops.LoRAConfig(r=8, modules_to_save=["down_proj"])
    whole, half = (estimate(skeleton(folder), config, batch=1, length=8, optimizer=o) for o in ("adamw", "adamw8bit"))
    model = peftops.attach(AutoModelForCausalLM.from_pretrained(folder), config)
    optimizer = peftops.AdamW8bit([p for p in model.parameters() if p.requires_grad])
    model(input_ids=models.tokens(1, 8), labels=models.tokens(1, 8)).loss.backward()
    optimizer.step()
    kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    assert {t.dtype for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)} == {
        torch.uint8,
        torch.float32,
    }
    assert half.optimizer == 4 * half.trainable + kept and half.optimizer < 0.8 * whole.optimizer
    with pytest.raises(ValueError, match="optimizer must be one of 'adamw', 'adamw8bit', not 'sgd'"):
        estimate(skeleton(folder), config, optimizer="sgd")


def test_more_takes_more(root):
    model = skeleton(folder_of(models.llama, root))
    of = lambda r=8, **options: estimate(model, peftops.LoRAConfig(r=r), **{"batch": 2, "length": 32, **options})
    base = of()
    for larger in (of(r=16), of(batch=3), of(length=48)):
        assert larger.total > base.total
    assert of(r=16).optimizer == 2 * base.optimizer
    narrow = skeleton(folder_of(models.llama, root), torch.bfloat16)
    half = estimate(narrow, peftops.LoRAConfig(r=8), batch=2, length=32)
    assert half.weights < 0.6 * base.weights and half.activations < 0.8 * base.activations
    assert half.trainable == base.trainable and half.optimizer == base.optimizer  # float32 in any case


def test_a_large_model_needs_no_memory():
    """LLaMA-7B's shapes: the weights' and LoRA's sizes are known."""
    from transformers import LlamaConfig

    trace.register_attention()
    with torch.device("meta"):
        config = LlamaConfig(num_hidden_layers=4)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=trace.ATTENTION)
    got = estimate(model, peftops.LoRAConfig(r=8, target=["q_proj", "v_proj"]), batch=1, length=2048)
    assert got.trainable == 4 * 2 * 8 * 2 * 4096
    assert got.weights == pytest.approx(2 * (2 * 32000 * 4096 + 4 * (4 * 4096**2 + 3 * 4096 * 11008)), rel=1e-3)
    four_bits = estimate(model, peftops.QLoRAConfig(r=8), batch=1, length=2048)
    linear = 4 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert four_bits.weights - (got.weights - 2 * linear) == pytest.approx(0.5159 * linear, rel=1e-3)


def fitting(**totals):
    return [Estimate(name, trainable=1000, weights=total) for name, total in totals.items()]


def test_the_choice_and_its_reasons():
    lora_does_not = fitting(lora=900, dora=800, qlora=300, lorafa=200)
    choice = choose(lora_does_not, 500)
    assert choice.estimate.method == "qlora"
    text = " ".join(choice.reasons)
    assert "lora does not fit" in text and "dora does not fit" in text and "room for lora with" in text
    assert choose(lora_does_not, 1000).estimate.method == "lora"
    assert choose(lora_does_not, 1000) == choose(lora_does_not[::-1], 1000)  # whatever the order
    assert choose(lora_does_not, 1000, want="memory").estimate.method == "qlora"
    shared = choose(lora_does_not, 1000, tasks=50)
    assert shared.estimate.method == "lora" and any("50 adapters" in reason for reason in shared.reasons)
    assert choose(fitting(lora=1, vera=1), 10, tasks=5000).estimate.method == "vera"
    nothing = choose(lora_does_not, 100)
    assert nothing.estimate is None and "No other method fits" in " ".join(nothing.reasons)
    other = choose([*fitting(lora=900, normtuning=5), Estimate("dora", why_not="no linear layers")], 100)
    assert other.estimate.method == "normtuning"
    assert any("dora cannot be used here: no linear layers" in reason for reason in other.reasons)
    assert "Of all others, normtuning takes least." in other.reasons
    assert other.estimate.trainable == 1000 and Estimate("dora").trainable == 0


def test_the_tables_own_rows_are_told_from_ours():
    seven = {"prompttuning", "prefixtuning", "bottleneck", "lora", "qlora", "qalora", "relora"}
    assert {method for method, traits in TABLE.items() if not traits.ours} == seven


def test_what_takes_all_of_the_memory_fits():
    for lora in (Estimate("lora", weights=500), Estimate("lora", weights=200, optimizer=180, activations=120)):
        assert choose([lora], 500).estimate is lora and choose([lora], 499).estimate is None


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_method_is_in_the_table_and_can_be_chosen(name):
    assert name in TABLE
    wants = [want for want, rule in WANTS.items() if name in rule.methods]
    assert wants, "no want leads to it"
    assert choose(fitting(**{name: 1}), 10, want=wants[0]).estimate.method == name
    assert set(TASKS.methods) <= set(TABLE)


def test_bad_input(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"):
        skeleton(tmp_path)
    models.vit().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="no causal language model of a vit"):
        skeleton(tmp_path / "vit")
    model = skeleton(folder_of(models.llama, root))
    for options in ({"batch": 0}, {"length": 0}, {"length": 513}):
        with pytest.raises(ValueError, match=r"at least 1 \(length at most 512\), not "):
            estimate(model, peftops.LoRAConfig(), **options)
    assert "has no biases to train" in estimate(model, peftops.BitFitConfig()).why_not
    with pytest.raises(ValueError, match=r"want must be one of quality, .*, not 'luck'"):
        choose([], 1, want="luck")
    for memory, tasks in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"must be at least 1, not {memory} and {tasks}"):
            choose([], memory, tasks=tasks)
    quantized = tmp_path / "quantized"
    folder = folder_of(models.llama, root)
    quantized.mkdir()
    text = (folder / "config.json").read_text()
    (quantized / "config.json").write_text(text.replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1))
    with pytest.raises(ValueError, match="is quantised already"):
        skeleton(quantized)


def test_what_needs_weights_is_told(root, monkeypatch):
    class Curious(type(peftops.LoRAConfig())):
        pass

    class Looking(METHODS[peftops.LoRAConfig]):
        def begin(self, base):
            self.largest = base.weight.max().item()
            return base

    monkeypatch.setitem(METHODS, Curious, Looking)
    got = estimate(skeleton(folder_of(models.llama, root)), Curious(r=2))
    assert got.method == "looking" and "depends on the weights, which a plan does not read" in got.why_not


def test_all_of_them(root):
    names = [e.method for e in estimate_all(skeleton(folder_of(models.llama, root)), r=4, batch=1, length=8)]
    assert names == sorted(NAMES)
