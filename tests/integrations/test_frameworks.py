"""Other people's training loops with their default settings: train, checkpoint, resume bit for bit, load the best.

Each is run on a base in 4 bits with the adapter of peftops.attach and with HF PEFT's. What each test proves is a row of
docs/frameworks.md, whose lines of code are run here as well.
"""

import json
import re
from pathlib import Path

import pytest
import torch

import models
import peftops
from proves import proves, table

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="training loops need accelerate")
QUIET = dict(use_cpu=True, report_to=[], disable_tqdm=True, seed=0, per_device_train_batch_size=2)


DOCUMENT = Path(__file__).resolve().parents[2] / "docs/frameworks.md"


def base():
    """A tiny model that transformers has read into 4 bits."""
    return transformers.AutoModelForCausalLM.from_pretrained(_FOLDER[0], quantization_config=peftops.NF4Config())


_FOLDER = []


@pytest.fixture(scope="module", autouse=True)
def _model(tmp_path_factory):
    _FOLDER[:] = [str(tmp_path_factory.mktemp("model"))]
    models.llama(vocabulary=320).save_pretrained(_FOLDER[0])


def attached():
    torch.manual_seed(0)
    return peftops.attach(base(), peftops.LoRAConfig(r=4))


def with_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


both = pytest.mark.parametrize("adapted", [attached, with_peft], ids=["attach", "peft"])


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(a, b):
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        ids = models.tokens(6, 9)[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@proves("transformers.Trainer", train="yes", checkpoint="yes", resume="bit for bit, and the best one", save="yes")
@both
def test_trainer(tmp_path, adapted):
    """Checkpoints, optimizer and all, are enough to go on; and the best of them comes back at the end."""

    def trainer(model, **options):
        steps = dict(
            max_steps=4,
            learning_rate=0.02,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
        )
        args = transformers.TrainingArguments(str(tmp_path), **QUIET | steps | options)
        return transformers.Trainer(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows())

    first = trainer(adapted())
    first.train()
    whole = trained(first.model)
    resumed = trainer(adapted())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(trained(resumed.model), whole)
    best = trainer(adapted(), max_steps=6, learning_rate=0.5)  # which spoils what was learnt
    best.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    state = json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())
    assert state["best_global_step"] == int(best.state.best_model_checkpoint.rpartition("-")[2])
    metrics = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert best.evaluate()["eval_loss"] == pytest.approx(min(metrics), abs=1e-5)


@proves("accelerate", train="yes", checkpoint="`save_state`", resume="bit for bit")
@both
def test_accelerate(tmp_path, adapted):
    """``save_state`` and ``load_state`` around a loop of one's own."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def run(steps, folder=None, load=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, model = Accelerator(cpu=True), adapted().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        if load:
            accelerator.load_state(str(load))
        for i in steps:
            ids = models.tokens(2, 9, seed=i)
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
        if folder:
            accelerator.save_state(str(folder))
        return trained(model)

    run(range(2), folder=tmp_path / "half")
    assert_same(run(range(2, 4), load=tmp_path / "half"), run(range(4)))
    AcceleratorState._reset_state(reset_partial_state=True)


def _chats(kind):
    datasets = pytest.importorskip("datasets")
    if kind == "dpo":
        pair = {"chosen": "hello", "rejected": "bye"}
        return datasets.Dataset.from_list([{"prompt": f"hi {i}", **pair} for i in range(6)])
    talk = lambda i: [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"hello {i}"}]
    return datasets.Dataset.from_list([{"messages": talk(i)} for i in range(6)])


@proves(
    "TRL: SFTTrainer, DPOTrainer", train="yes", checkpoint="yes", resume="bit for bit with `attach` (1)", save="yes"
)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("how", ["attach", "peft_config"])
def test_trl(tmp_path, kind, how):
    """SFTTrainer and DPOTrainer as their quickstarts have them; a reference model is the base without its adapter."""
    trl = pytest.importorskip("trl", reason="pip install 'peftops[frameworks]'")
    peft = pytest.importorskip("peft")
    make, options = (trl.SFTTrainer, trl.SFTConfig) if kind == "sft" else (trl.DPOTrainer, trl.DPOConfig)

    def trainer(steps):
        args = options(str(tmp_path), max_steps=steps, save_steps=2, learning_rate=0.02, bf16=False, **QUIET)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if how != "attach" else None
        return make(
            model=base() if config else attached(),
            args=args,
            train_dataset=_chats(kind),
            peft_config=config,
            processing_class=models.tokenizer(),
        )

    first = trainer(4)
    before = trained(first.model)
    first.train()
    whole = trained(first.model)
    assert any(not torch.equal(before[name], p) for name, p in whole.items())
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    if how == "attach":
        assert_same(trained(resumed.model), whole)
    else:  # TRL trains PEFT's adapters in bfloat16, and PEFT reads them back as float32
        again, size = trained(resumed.model), lambda t: torch.stack([p.float().norm() for p in t]).norm()
        moved = size(p.float() - before[name].float() for name, p in whole.items())
        assert size(p.float() - whole[name].float() for name, p in again.items()) < 0.05 * moved


@proves("TRL: SFTTrainer, DPOTrainer", resume="and the best one")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_loads_the_best(tmp_path, kind):
    trl = pytest.importorskip("trl", reason="pip install 'peftops[frameworks]'")
    make, options = (trl.SFTTrainer, trl.SFTConfig) if kind == "sft" else (trl.DPOTrainer, trl.DPOConfig)
    each = {"strategy": "steps", "steps": 1}
    often = {f"{what}_{key}": value for what in ("save", "eval") for key, value in each.items()}
    often |= dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)  # so the first is
    args = options(str(tmp_path), max_steps=2, learning_rate=0.02, bf16=False, **QUIET | often)
    rows = _chats(kind)
    trainer = make(
        model=attached(), args=args, train_dataset=rows, eval_dataset=rows, processing_class=models.tokenizer()
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    first, last = (peftops.load(base(), tmp_path / f"checkpoint-{step}") for step in (1, 2))
    assert_same(trained(trainer.model), trained(first))
    assert any(not torch.equal(p, trained(last)[name]) for name, p in trained(first).items())


def test_the_document_has_the_table():
    assert table() in DOCUMENT.read_text(), f"python {Path(proves.__code__.co_filename).name} prints it"


def _examples():
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    return re.findall(r"^## (.*?)$.*?^```python\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.parametrize("title, code", _examples(), ids=lambda part: part.split("\n")[0][:20])
def test_the_lines_of_the_document_run(tmp_path, monkeypatch, title, code):
    for library in re.findall(r"^(?:from|import) (\w+)", code, re.M):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    given = {"path": _FOLDER[0], "rows": Rows(), "tokenizer": models.tokenizer(), "ids": models.tokens()}
    if "trl" in code:
        given["chats"] = _chats("sft")
    for name in ("TrainingArguments", "SFTConfig"):  # a moment of each is enough
        code = code.replace(f'{name}("run"', f'{name}("run", max_steps=1, use_cpu=True, report_to=[]')
    exec(compile(code, f"{DOCUMENT.name}: {title}", "exec"), given)
