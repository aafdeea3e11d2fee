"""Training on several devices: two gloo processes, each with half of the rows, are one with all of them."""

import pytest
import torch

import models
import peftops
from gloo import met, together
from moe_models import moe
from peftops import LoRAConfig, PromptTuningConfig, QALoRAConfig, QLoRAConfig
from peftops.integrations.peft_files import WEIGHTS

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

METHODS = {
    "lora": LoRAConfig(r=4),
    "qlora": QLoRAConfig(r=4),
    "qalora": QALoRAConfig(r=4, group_size=16, bits=4),
    "prompttuning": PromptTuningConfig(tokens=3, init="vocab"),
    "experts": QLoRAConfig(r=2),
}
STEPS = 3


def start(method):
    torch.manual_seed(0)
    base = moe("Qwen3Moe", vocab_size=64) if method == "experts" else models.llama(vocabulary=64)
    model = peftops.attach(base, METHODS[method.removeprefix("two-")])
    if method.startswith("two-"):  # another beside it, which rests
        peftops.attach(model, LoRAConfig(r=2), name="other")
        peftops.activate(model, "default")
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():  # a B of zeros would leave A without a gradient
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return model, torch.randint(0, 64, (4, 9), generator=generator)


def train(model, run, ids):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(STEPS):
        run(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_a_process(rank, world, how, method, folder):
    with met(rank, world, f"{folder}/met"):
        train_a_share(rank, world, how, method, folder)


def train_a_share(rank, world, how, method, folder):
    from torch.distributed.fsdp import fully_shard

    model, ids = start(method)
    if how == "ddp":
        run = torch.nn.parallel.DistributedDataParallel(model)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (world,))
        kept = sum(p.nbytes for p in model.model.layers.parameters())
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
        held = sum(p.to_local().nbytes for p in model.model.layers.parameters())
        assert held < (0.5 + 0.02) * kept, f"a rank holds {held} of {kept} bytes"
    train(model, run, ids[rank::world])
    if how == "fsdp" or rank == 0:
        peftops.save(model, f"{folder}/trained")


@pytest.mark.parametrize(
    "how, method",
    [
        ("ddp", "qlora"),
        ("ddp", "two-lora"),
        ("ddp", "prompttuning"),
        ("ddp", "experts"),
        ("fsdp", "experts"),
        ("fsdp", "lora"),
        ("fsdp", "qlora"),
        ("fsdp", "qalora"),
    ],
)
def test_two_processes_train_like_one(tmp_path, how, method):
    together(in_a_process, how, method, tmp_path)
    model, ids = start(method)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, model, ids)
    peftops.save(model, tmp_path / "alone")
    trained, alone = (peftops_file(tmp_path / name) for name in ("trained", "alone"))
    assert trained.keys() == alone.keys()
    moved = max((p - before[n]).abs().max() for n, p in model.named_parameters() if p.requires_grad)
    for key, value in alone.items():
        # Gradients are those of a mean over the rows, once in one sum and once in two.
        assert (trained[key] - value).abs().max() <= 1e-4 * moved, key


def test_ddp_is_told_the_names_that_codes_have_now():
    model = models.llama(vocabulary=64)
    ignored = "_ddp_params_and_buffers_to_ignore"  # torch's own name
    codes = lambda: {n for n, p in model.named_parameters() if isinstance(p, peftops.NF4Tensor)}
    setattr(model, ignored, ["lm_head.weight"])
    peftops.attach(model, QLoRAConfig(r=2))
    peftops.attach(model, LoRAConfig(r=2, target=["q_proj"]), name="other")
    assert codes() and set(getattr(model, ignored)) == {"lm_head.weight", *codes()}
    peftops.detach(model, "default")
    assert set(getattr(model, ignored)) == {"lm_head.weight", *codes()}
    peftops.detach(model)
    assert getattr(model, ignored) == ["lm_head.weight"]


def peftops_file(folder):
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("double_quant", [True, False])
def test_rows_of_codes_and_back(double_quant):
    weight = peftops.nf4_quantize(torch.randn(12, 96), block_size=64, double_quant=double_quant)
    parts = torch.chunk(weight, 3)
    assert [tuple(p.shape) for p in parts] == [(4, 96)] * 3 and sum(p.packed.numel() for p in parts) == 12 * 96 // 2
    gathered = tuple(torch.cat([getattr(p, name) for p in parts]) for name in ("packed", "_absmax"))
    back, inner = parts[0].fsdp_post_all_gather(gathered, weight.shape, weight.dtype)
    assert torch.equal(back, weight) and inner == ()
    if not double_quant:  # a share of its own is a weight like any other
        rows = peftops.nf4_dequantize(weight)
        assert torch.equal(peftops.nf4_dequantize(parts[1]), rows[4:8])


def test_a_share_that_would_mean_something_else_is_refused():
    weight = peftops.nf4_quantize(torch.randn(512, 64), block_size=64)  # 512 absmax values have two scales
    with pytest.raises(RuntimeError, match="absmax_scale must have 1 elements, not 2"):
        peftops.nf4_dequantize(torch.chunk(weight, 2)[1])


def test_what_cannot_be_cut_says_so():
    for shape, block, ways, match in [
        ((4, 48), 64, 2, r"NF4Tensor of shape \[4, 48\] cannot be cut before row 2"),
        ((4, 24), 64, 2, r"NF4Tensor of shape \[4, 24\] cannot be cut"),  # its last block is ragged
        ((10, 64), 64, 4, "NF4Tensor of 10 rows cannot be sharded evenly, 3 rows each"),
    ]:
        weight = peftops.nf4_quantize(torch.randn(shape), block_size=block)
        with pytest.raises(ValueError, match=match):
            torch.chunk(weight, ways)
    with pytest.raises(NotImplementedError, match="does not work on an NF4Tensor"):
        weight.view(2, -1)
