"""Checkpoints that other libraries write of a frozen base, and which they refuse; the libraries are stand-ins here.

``test_several_processes.py`` has the libraries themselves.
"""

from types import SimpleNamespace

import pytest
import torch

import models
import peftops

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def attached(config=peftops.QLoRAConfig(r=2)):  # noqa: B008  (it cannot change)
    return peftops.attach(models.llama(), config)


def utilities():
    from peftops.integrations.sharded import without_base

    theirs = lambda *args, **how: "theirs"
    made = SimpleNamespace(
        _get_model_state_dict=theirs, _set_model_state_dict=theirs, is_peft_model=lambda model: False
    )
    without_base(made)
    return made


class Engine:
    """As much of DeepSpeed's as is changed."""

    def __init__(self, module, stage=2):
        self.module, self.stage, self.sent, self.saved, self.strict = module, stage, [], {}, None

    def zero_optimization_partition_weights(self):
        return self.stage == 3

    def _broadcast_model(self):
        self.sent = [name for name, p in self.module.named_parameters() if not hasattr(p, "ds_optim_param")]

    def save_checkpoint(self, folder, **options):
        self.saved = self.module_state_dict(**options)

    def module_state_dict(self, exclude_frozen_parameters=False):
        state = self.module.state_dict()
        for name, parameter in self.module.named_parameters():
            if exclude_frozen_parameters and not parameter.requires_grad:
                state.pop(name, None)
        return state

    def load_module_state_dict(self, checkpoint, strict=True):
        self.strict = strict
        return self.module.load_state_dict(checkpoint["module"], strict=strict)


@pytest.fixture
def engine():
    from peftops.integrations.sharded import deepspeed_without_base

    kind = type("Engine", (Engine,), {})
    deepspeed_without_base(kind)
    return kind


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_accelerates_checkpoints_have_what_trains():
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    of, model = utilities(), attached(peftops.LoRAConfig(r=2))
    state = of._get_model_state_dict(model, adapter_only=False, sd_options=StateDictOptions())
    assert state.keys() == trained(model)
    changed = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    of._set_model_state_dict(model, changed, adapter_only=False, sd_options=StateDictOptions())
    assert all((p == 1).all() for p in model.parameters() if p.requires_grad)
    first = min(changed)
    del changed[first]
    with pytest.raises(ValueError, match=f"does not fit: it has no {first}"):
        of._set_model_state_dict(model, changed, adapter_only=False, sd_options=StateDictOptions())


def test_accelerate_has_its_way_with_other_models():
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    of = utilities()
    for model, options in ((models.llama(), StateDictOptions()), (attached(), None)):  # FSDP1 has no options
        assert of._get_model_state_dict(model, sd_options=options) == "theirs"
        assert of._set_model_state_dict(model, {}, sd_options=options) == "theirs"


def test_deepspeeds_checkpoints_have_what_trains(engine):
    model = attached()
    run = engine(model)
    run.save_checkpoint("folder")
    assert run.saved.keys() == trained(model)
    run.load_module_state_dict({"module": run.saved})
    assert run.strict is False
    first = min(run.saved)
    del run.saved[first]
    with pytest.raises(ValueError, match=f"does not fit: it has no {first}"):
        run.load_module_state_dict({"module": run.saved})


def test_deepspeed_sends_no_codes(engine):
    run = engine(attached())
    run._broadcast_model()
    codes = [n for n, p in run.module.named_parameters() if isinstance(p, peftops.NF4Tensor)]
    assert codes and run.sent and not set(codes) & set(run.sent)
    assert not any(hasattr(p, "ds_optim_param") for p in run.module.parameters())
    with pytest.raises(ValueError, match="ZeRO stage 3 cuts each parameter into shares"):
        engine(attached(), stage=3)._broadcast_model()


def test_deepspeed_has_its_way_with_other_models(engine):
    run = engine(models.llama(), stage=3)
    run._broadcast_model()
    run.save_checkpoint("folder")
    run.load_module_state_dict({"module": run.saved})
    assert run.strict is True and run.saved.keys() == run.module.state_dict().keys() and run.sent
