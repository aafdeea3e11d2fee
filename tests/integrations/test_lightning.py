"""Lightning's Trainer with its default settings: its checkpoints hold the whole model, codes too."""

import pytest
import torch

import models
import peftops
from proves import proves

lightning = pytest.importorskip("lightning", reason="pip install 'peftops[frameworks]'")
pytestmark = pytest.mark.filterwarnings("ignore")


def attached():
    torch.manual_seed(0)
    return peftops.attach(models.llama(), peftops.QLoRAConfig(r=4))


def with_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = peftops.detach(peftops.attach(models.llama(), peftops.QLoRAConfig(r=4)))
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


class Module(lightning.LightningModule):
    def __init__(self, adapted):
        super().__init__()
        self.model = adapted()

    def training_step(self, ids, index):
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@proves("Lightning", train="yes", checkpoint="yes, of the whole model", resume="bit for bit")
@pytest.mark.parametrize("adapted", [attached, with_peft], ids=["attach", "peft"])
def test_lightning(tmp_path, adapted):
    rows = torch.utils.data.DataLoader(models.tokens(4, 9), batch_size=2)

    def fit(epochs, resumed=None):
        module = Module(adapted)
        quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=tmp_path / str(epochs), **quiet)
        trainer.fit(module, rows, ckpt_path=resumed)
        return module, trainer.checkpoint_callback.best_model_path

    first, half = fit(1)
    whole, _ = fit(2)
    assert any(not torch.equal(p, trained(whole)[name]) for name, p in trained(first).items())
    resumed, _ = fit(2, half)
    again = trained(resumed)
    assert again and all(torch.equal(p, again[name]) for name, p in trained(whole).items())
