"""Two processes on a base in 4 bits: checkpoints, resumed bit for bit, and one adapter's files.

Trainer and accelerate bring DistributedDataParallel, FSDP2 and DeepSpeed; FSDP2 is used without them as well, with
torch's distributed checkpoints. Each pair of processes does all of one engine: most of the time goes into starting
them.
"""

import contextlib
import os
from unittest import mock

import pytest
import torch

import models
import peftops
from gloo import met, together
from peftops.integrations.peft_files import CONFIG, WEIGHTS
from proves import proves

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="training loops need accelerate")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = models.tokens(8, 9)[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def base(folder):
    """transformers reads it into 4 bits, in each process."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", quantization_config=peftops.NF4Config(double_quant=False)
    )


def attached(folder):
    torch.manual_seed(0)
    return peftops.attach(base(folder), peftops.LoRAConfig(r=4))


def with_peft(folder):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base(folder), config)


ADAPTED = {"attach": attached, "peft": with_peft}


def trained(model):
    whole = lambda p: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def assert_same(a, b):
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@contextlib.contextmanager
def accelerators():
    """accelerate has FSDP and DeepSpeed on accelerators alone. Inside, it takes the CPU for one, and gloo for NCCL."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    found = mock.Mock(return_value=("gloo", DistributedType.MULTI_GPU))
    on_cpu = lambda self: setattr(self, "device", torch.device("cpu"))
    environment = mock.patch.dict(os.environ, DS_ACCELERATOR="cpu")  # (accelerate sets variables that are to go, too)
    with environment, mock.patch.multiple(PartialState, _prepare_backend=found, set_device=on_cpu):
        yield


def with_trainer(model_folder, folder, adapted, **engine):
    """Four steps, and two of them again from the checkpoint in the middle."""
    from accelerate.state import AcceleratorState

    def trainer():
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = transformers.TrainingArguments(
            f"{folder}/run",
            max_steps=4,
            save_steps=2,
            learning_rate=0.02,
            per_device_train_batch_size=2,
            report_to=[],
            disable_tqdm=True,
            **(engine or {"use_cpu": True}),
        )
        return transformers.Trainer(model=adapted(model_folder), args=arguments, train_dataset=Rows())

    first = trainer()
    before = trained(first.model)
    first.train()
    whole = trained(first.model)
    assert any(not torch.equal(before[name], whole[name]) for name in before)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=f"{folder}/run/checkpoint-2")
    assert_same(trained(resumed.model), whole)
    resumed.save_model(f"{folder}/adapter")


def with_trainer_and_fsdp(model_folder, folder, adapted):
    options = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "version": 2}
    for kind, efficient in (("SHARDED_STATE_DICT", False), ("FULL_STATE_DICT", True)):
        options |= {"state_dict_type": kind, "cpu_ram_efficient_loading": efficient}
        with accelerators():
            with_trainer(model_folder, f"{folder}/{kind}", adapted, fsdp=True, fsdp_config=options)
    if adapted is attached:  # (of HF PEFT's models, accelerate keeps the second name of a tied weight)
        state = torch.load(f"{folder}/FULL_STATE_DICT/run/checkpoint-2/pytorch_model_fsdp.bin")
        assert state and all("lora" in key for key in state)


def with_accelerate_and_fsdp(model_folder, folder, adapted):
    from accelerate import FullyShardedDataParallelPlugin

    shards = dict(fsdp_version=2, transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
    with accelerators():
        with_accelerate(model_folder, folder, adapted, lambda: FullyShardedDataParallelPlugin(**shards))


def with_deepspeed(model_folder, folder, adapted):
    for stage in (1, 2):
        options = {
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "zero_allow_untested_optimizer": True,
        }
        with accelerators():
            with_trainer(model_folder, f"{folder}/{stage}", adapted, deepspeed=options)
        state = torch.load(f"{folder}/{stage}/run/checkpoint-2/global_step2/mp_rank_00_model_states.pt")["module"]
        assert state and all("lora" in key for key in state)
    options["zero_optimization"]["stage"] = 3
    with accelerators(), pytest.raises(ValueError, match="stage 3 cuts each parameter into shares"):
        with_trainer(model_folder, f"{folder}/3", adapted, deepspeed=options)


def with_accelerate(model_folder, folder, adapted, plugin=None):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def run(steps, save=None, load=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(fsdp_plugin=plugin()) if plugin else Accelerator(cpu=True)
        model = adapted(model_folder).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        if load:
            accelerator.load_state(load)
        for i in steps:
            ids = models.tokens(2, 9, seed=2 * i + accelerator.process_index)
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
        if save:
            accelerator.save_state(save)
        return trained(model)

    run(range(2), save=f"{folder}/state")
    assert_same(run(range(2, 4), load=f"{folder}/state"), run(range(4)))


def with_fsdp(model_folder, folder, adapted):
    """Shards of layers, and checkpoints of what trains, each process's own part of it."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    options = StateDictOptions(ignore_frozen_params=True, strict=False)

    def run(steps, save=None, load=None, adapter=None):
        model = adapted(model_folder).train()
        for layer in model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("layers"))):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert "in_features=64" in repr(model)
        whole = "merging needs whole weights, and fully_shard has cut them"
        if adapted is attached:
            assert "lora" in str(peftops.summary(model)).lower()
            with pytest.raises(ValueError, match="fully_shard knows only the parameters that existed"):
                peftops.attach(model, peftops.LoRAConfig(r=2), name="second")
            with pytest.raises(ValueError, match=whole):
                peftops.merge(model)
        else:
            with pytest.raises(ValueError, match=whole):
                model.merge_adapter()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        if load:
            parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
            checkpoint.load(parts, checkpoint_id=load)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=parts["model"],
                optim_state_dict=parts["optimizer"],
                options=options,
            )
        for i in steps:
            ids = models.tokens(2, 9, seed=2 * i + mesh.get_rank())
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if save:
            parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
            assert not any(isinstance(t, peftops.NF4Tensor) for t in parts["model"].values())
            checkpoint.save(parts, checkpoint_id=save)
        if adapter:
            model.save_pretrained(adapter)
        return trained(model)

    run(range(2), save=f"{folder}/half")
    whole = run(range(4), adapter=f"{folder}/adapter" if adapted is attached else None)
    assert_same(run(range(2, 4), load=f"{folder}/half"), whole)


ENGINES = {  # what trains with it, and the folder of the adapter that it saves
    "ddp": ((with_trainer, with_accelerate), "adapter"),
    "fsdp": ((with_fsdp, with_trainer_and_fsdp, with_accelerate_and_fsdp), "FULL_STATE_DICT/adapter"),
    "deepspeed": ((with_deepspeed,), "2/adapter"),
}


def in_a_process(rank, world, engine, folder):
    from transformers import trainer  # noqa: F401  (takes long, so before they meet)

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # (the file is where they meet)
    with met(rank, world, f"{folder}/met"):
        for how, adapted in ADAPTED.items():
            for loop in ENGINES[engine][0]:
                loop(folder, f"{folder}/{how}", adapted)


@proves("transformers.Trainer", several="DDP, FSDP2, DeepSpeed")
@proves("accelerate", several="DDP, FSDP2")
@proves("HF PEFT on our layers", several="DDP, FSDP2")
@proves("torch FSDP2", train="yes", checkpoint="its own", resume="bit for bit", save="yes", several="yes")
@proves("DeepSpeed: ZeRO-1, ZeRO-2", train="yes", checkpoint="its own", resume="bit for bit", save="yes", several="yes")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes(tmp_path, engine):
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    models.llama(vocabulary=320).save_pretrained(tmp_path / "model")
    together(in_a_process, engine, tmp_path)
    for how in ADAPTED:
        folder = tmp_path / how / ENGINES[engine][1]
        files = {path.name for path in folder.iterdir()}
        assert {CONFIG, WEIGHTS} <= files and not any(name.startswith("model") for name in files), files
        read = peftops.load(base(tmp_path), folder)
        assert (read(models.tokens()).logits - base(tmp_path)(models.tokens()).logits).abs().max() > 1e-3
