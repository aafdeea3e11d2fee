"""Where HF PEFT's LoRA started, and what else of its files is not as simple as it looks."""

import pytest
import torch
from torch import nn

import models
import peftops

peft = pytest.importorskip("peft")
ids = models.tokens()


def trained(model, **options):
    """PEFT's, after some training."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    other = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    return other.eval()


@pytest.mark.parametrize(
    "start, build",
    [
        *((start, models.llama) for start in (True, False, "gaussian", "orthogonal", "pissa", "olora", "OLoRA")),
        ("pissa", models.gpt2),  # whose weights lie the other way; PEFT's OLoRA does not know that
    ],
)
def test_a_start_is_made_again(tmp_path, start, build):
    target = ["c_attn", "c_proj"] if build is models.gpt2 else ["q_proj", "v_proj"]
    other = trained(build(), init_lora_weights=start, target_modules=target)
    other.save_pretrained(tmp_path)
    model = peftops.load(build(), tmp_path)
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    # and what we write of it stands on the base as it is, for both
    peftops.save(model, tmp_path / "again")
    for read in (peft.PeftModel.from_pretrained, peftops.load):
        again = read(build(), tmp_path / "again")
        torch.testing.assert_close(again(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "pissa", "use_dora": True},
    ],
    ids=str,
)
def test_a_start_that_cannot_be_made_again_is_refused(tmp_path, options):
    trained(models.llama(), **options).save_pretrained(tmp_path)
    model = models.llama()
    with pytest.raises(ValueError, match="this adapter needs (init_lora_weights='pissa|use_dora)"):
        peftops.load(model, tmp_path)
    assert not hasattr(model, "_peftops")


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "something new", 3, ["pissa"]])
def test_unknown_starts_are_refused(tmp_path, start):
    import json

    trained(models.llama()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"init_lora_weights": start}))
    with pytest.raises(ValueError, match="this adapter needs init_lora_weights="):
        peftops.load(models.llama(), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_of_a_dense_base_is_refused_on_codes(tmp_path, start):
    trained(models.llama(), init_lora_weights=start).save_pretrained(tmp_path)
    base = peftops.detach(peftops.attach(models.llama(), peftops.QLoRAConfig(r=4)))
    with pytest.raises(ValueError, match="subtracted the start of this adapter from a dense base"):
        peftops.load(base, tmp_path)
    with pytest.raises(ValueError, match="init_lora_weights"):
        peftops.load(models.llama(), tmp_path, quantize=True)


def test_a_resized_embedding(tmp_path):
    """PEFT saves its whole weight beside A and B. It is the model's, or the file is refused."""

    def resized(seed):
        model = models.llama(tied=False)
        torch.manual_seed(seed)
        model.resize_token_embeddings(328, mean_resizing=False)
        return model

    x = torch.tensor([[1, 5, 321, 322, 7]])
    other = trained(resized(1), target_modules=["q_proj", "embed_tokens"])
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(peftops.load(resized(1), tmp_path)(x).logits, other(x).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds the weight of model.embed_tokens itself"):
        peftops.load(resized(2), tmp_path)


class Blocks(nn.Module):
    """Layers whose names are the ends of others' names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.down = nn.LayerNorm(8), nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"input_norm": nn.LayerNorm(8), "k": nn.Linear(8, 8), "down": nn.Linear(8, 8)})

    def forward(self, x):
        x = self.inner["k"](self.inner["input_norm"](x))
        return self.norm(self.down(torch.tanh(self.inner["down"](x))))


x = torch.linspace(-1, 1, 24).view(3, 8)


@pytest.mark.parametrize(
    "config",
    [
        peftops.LoRAConfig(r=2, target=["k"], modules_to_save=["norm"]),
        peftops.LoRAConfig(r=2, target=["k"], modules_to_save=["inner.input_norm"]),
        peftops.LoRAConfig(r=2, target=r"down|inner\.k"),
        peftops.LoRAConfig(r=2, target=r"down"),
        peftops.IA3Config(target=["k", "down"], feedforward=["down"]),
        peftops.IA3Config(target=["k", "down"], feedforward=["inner.down"]),
        peftops.IA3Config(target=r"inner\.(k|down)", feedforward=r"inner\.down"),
        peftops.IA3Config(target=["inner.k", "down"], feedforward=["k"]),
        peftops.IA3Config(target=["k", "down"]),
        peftops.NormTuningConfig(norms=["inner.input_norm"]),
        peftops.NormTuningConfig(norms="norm"),
    ],
    ids=str,
)
def test_peft_reads_what_we_write_of_such_names(tmp_path, config):
    model = peftops.attach(Blocks(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    peftops.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(Blocks(), tmp_path)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(peftops.load(Blocks(), tmp_path)(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.LoraConfig(r=2, target_modules=["k"], modules_to_save=["norm"]),
        lambda: peft.LoraConfig(r=2, target_modules="down"),
        lambda: peft.IA3Config(target_modules=["k", "down"], feedforward_modules=["down"]),
        lambda: peft.IA3Config(target_modules="inner.*(k|down)", feedforward_modules=r".*down"),
        lambda: peft.IA3Config(target_modules=["k", "down"], feedforward_modules=[]),
        lambda: peft.LNTuningConfig(target_modules="norm"),
        lambda: peft.LNTuningConfig(target_modules=["input_norm"]),
    ],
    ids=range(7),
)
def test_we_read_what_peft_writes_of_such_names(tmp_path, config):
    other = peft.get_peft_model(Blocks(), config())
    torch.manual_seed(1)
    for parameter in other.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    other.eval().save_pretrained(tmp_path)
    model = peftops.load(Blocks(), tmp_path)
    torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-6)
    trained = {n.replace(".adapters.default", "") for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == sum(p.requires_grad for p in other.parameters())
