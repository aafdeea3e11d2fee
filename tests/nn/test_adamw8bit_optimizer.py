"""AdamW with moments in 8 bits: the optimizer around the step, whose own tests are in tests/ops."""

import io

import pytest
import torch
import torch._dynamo.testing

import models
import peftops
from peftops import AdamW8bit


def parameters(*shapes, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def clones(ps):
    return [torch.nn.Parameter(p.detach().clone()) for p in ps]


def give_grads(*sides, seed):
    """The same random gradients, of a few sizes, to each side."""
    torch.manual_seed(seed)
    for same in zip(*sides, strict=True):
        grad = torch.randn(same[0].shape) * 10.0 ** torch.randint(-3, 1, same[0].shape)
        for p in same:
            p.grad = grad.to(p)


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SHAPES = [(64, 64), (5,), (4097,), (16, 300), (), (3, 5, 7), (0, 4), (100, 130)]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-3}])
def test_the_first_step_is_adamws_and_small_tensors_stay_so(options):
    """To a few roundings a step."""
    lr = 0.1
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    pair = AdamW8bit(ours, lr=lr, **options), torch.optim.AdamW(theirs, lr=lr, foreach=False, **options)
    for step in range(4):
        give_grads(ours, theirs, seed=step)
        for optimizer in pair:
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            close = ((p - q).abs() <= 8 * (step + 1) * 2**-24 * (p.abs() + lr)).all()
            assert close == (step == 0 or p.numel() < 4096)


def half_code(x, absmax, signed):
    """How far the nearest code is, at most, by the definition: 0.45 of a decade's 10^(e - 6) over its number of codes;
    below all decades at most the smallest code."""
    relative = (x.abs() / absmax).double()
    e = torch.floor(relative.clamp(min=1e-30).log10() + 7 - 1e-6).clamp(0, 6)  # (at a boundary either does)
    inside = 0.45 * 10 ** (e - 6) / 2 ** (e + (not signed))
    inside = torch.maximum(inside, 0.45 * 10 ** ((e + 1).clamp(max=6) - 6) / 2 ** ((e + 1).clamp(max=6) + (not signed)))
    return absmax * torch.where(relative < 1e-7, 5.5e-7 if signed else 3.25e-7, inside)


def test_a_step_errs_by_no_more_than_the_codes_of_the_moments():
    """From AdamW's own moments after one step: the next step lies between those that the ends of each code give."""
    lr, beta1, beta2, eps, size = 0.1, 0.9, 0.999, 1e-8, 64
    (ours,) = parameters((64, 128))
    (theirs,) = clones([ours])
    pair = AdamW8bit([ours], lr=lr, block_size=size, weight_decay=0.0), torch.optim.AdamW([theirs], lr, weight_decay=0)
    give_grads([ours], [theirs], seed=1)
    for optimizer in pair:
        optimizer.step()
    kept = pair[1].state[theirs]
    m, v = (kept[name].view(-1, size).double() for name in ("exp_avg", "exp_avg_sq"))
    dm, dv = (half_code(x, x.abs().amax(1, keepdim=True), s) * (1 + 1e-6) for x, s in ((m, True), (v, False)))
    before = ours.detach().clone()
    give_grads([ours], [theirs], seed=2)
    for optimizer in pair:
        optimizer.step()
    g = ours.grad.view(-1, size).double()
    m_low, m_high = (beta1 * (m + sign * dm) + (1 - beta1) * g for sign in (-1, 1))
    root = lambda v: (beta2 * v + (1 - beta2) * g * g).div(1 - beta2**2).sqrt() + eps
    small, large = root((v - dv).clamp(min=0)), root(v + dv)
    ends = torch.stack([lr / (1 - beta1**2) * a / b for a in (m_low, m_high) for b in (small, large)])
    step = (before - ours.detach()).view(-1, size).double()
    rounding = 2**-22 * (before.abs().view(-1, size) + ends.abs().amax(0))
    assert ((step >= ends.amin(0) - rounding) & (step <= ends.amax(0) + rounding)).all()
    assert ((ends.amax(0) - ends.amin(0)) / ends.abs().amax(0)).median() < 0.2  # and that is not much


def test_a_gradient_that_is_small_in_its_block_never_makes_a_large_step():
    """Were its second moment stored as zero, the step after would be divided by eps and what is new in it alone."""
    (p,) = parameters((64, 64))
    optimizer = AdamW8bit([p], lr=1.0, weight_decay=0.0)
    p.grad = torch.full_like(p, 3e-4)
    p.grad[:, 0] = 1.0
    for scale in (1.0, 0.0):  # the second has nothing new at all
        before = p.detach().clone()
        p.grad *= scale
        optimizer.step()
        assert (p - before).abs().max() <= 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_rounded_once(dtype):
    shapes = [(64, 64), (7,), (4099,)]
    half, full = parameters(*shapes, dtype=dtype), [p.float() for p in parameters(*shapes, dtype=dtype)]
    full = [torch.nn.Parameter(p.detach()) for p in full]
    pair = AdamW8bit(half), AdamW8bit(full)
    for step in range(3):
        for p, q in zip(half, full, strict=True):
            q.data.copy_(p)
        give_grads(half, seed=step)
        for p, q in zip(half, full, strict=True):
            q.grad = p.grad.float()
        for optimizer in pair:
            optimizer.step()
        assert all_equal(half, [q.to(dtype) for q in full])


def test_strides_of_parameters_and_gradients_do_not_matter():
    (plain,) = parameters((96, 64))
    turned = torch.nn.Parameter(plain.detach().t().contiguous().t())
    assert not turned.is_contiguous()
    pair = AdamW8bit([plain]), AdamW8bit([turned])
    for step in range(3):
        give_grads([plain], [turned], seed=step)
        plain.grad = plain.grad.t().contiguous().t()
        for optimizer in pair:
            optimizer.step()
    assert torch.equal(plain, turned)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_one_bad_gradient_takes_one_element(bad):
    """As in torch's own: it alone is NaN afterwards or moves no more, and the rest of its block moves on."""
    ends = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        (p,) = parameters((64, 128))
        optimizer = kind([p], weight_decay=0.0)
        for step in range(6):
            give_grads([p], seed=step)
            if step == 1:
                p.grad[3, 5] = bad
            before = p.detach().clone()
            optimizer.step()
        still = ~(p != before)
        ends.append((int(p.isnan().sum()), p[3, 5].item(), bool(still[3, 5])))
        assert still[2:4].sum() <= 2
    assert ends[0] == pytest.approx(ends[1], nan_ok=True)


def test_a_compiled_step_is_the_same_and_compiles_once():
    eager, compiled = parameters((64, 65), (8,)), parameters((64, 65), (8,))
    optimizers = AdamW8bit(eager), AdamW8bit(compiled)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter)
    def step(x):
        optimizers[1].step()
        return x + 1

    for i in range(10):
        give_grads(eager, compiled, seed=i)
        optimizers[0].step()
        step(torch.ones(2))
        optimizers[1].param_groups[0]["lr"] = optimizers[0].param_groups[0]["lr"] = 1e-3 / (i + 1)
    assert all_equal(eager, compiled) and counter.frame_count <= 1


def test_bytes_of_state():
    """2 bytes and two float32 per block of 256: 2.03."""
    (p,) = parameters((512, 512))
    p.grad = torch.randn_like(p)
    optimizer = AdamW8bit([p])
    optimizer.step()
    kept = sum(t.nbytes for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))
    assert kept / p.numel() == 2 + 8 / 256 and kept == AdamW8bit.state_bytes(p)
    assert AdamW8bit.state_bytes(p[:7, :500]) == 2 * 4 * 3500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_gives_the_same_bits(dtype):
    whole = parameters(*SHAPES, dtype=dtype)
    optimizer = AdamW8bit(whole, lr=0.01, block_size=64)
    for step in range(2):
        give_grads(whole, seed=step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "parameters": whole}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = saved["parameters"]
    other = AdamW8bit(resumed)  # the options come with the state
    other.load_state_dict(saved["optimizer"])
    for step in range(2, 5):
        give_grads(whole, resumed, seed=step)
        optimizer.step()
        other.step()
    assert all_equal(whole, resumed)
    assert other.param_groups[0]["block_size"] == 64 and other.state[resumed[0]]["exp_avg"].dtype == torch.uint8
    first = saved["optimizer"]["state"][0]
    assert first["step"] == 2 and not torch.equal(first["exp_avg"], other.state[resumed[0]]["exp_avg"])  # a copy


def test_a_state_of_something_else_is_refused():
    ps = parameters((64, 64), (8,))
    optimizer = AdamW8bit(ps)
    give_grads(ps, seed=0)
    optimizer.step()
    before = optimizer.state_dict()
    theirs = torch.optim.AdamW(ps)
    with pytest.raises(ValueError, match="AdamW8bit: this is the state of another optimizer"):
        optimizer.load_state_dict(theirs.state_dict())
    other = parameters((64, 65), (8,))
    give_grads(other, seed=0)
    another = AdamW8bit(other)
    another.step()
    with pytest.raises(ValueError, match=r"the state of a parameter of shape \[64, 64\] does not fit: it has .*17"):
        optimizer.load_state_dict(another.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(AdamW8bit(ps[:1]).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(after["state"][0][key] is value for key, value in before["state"][0].items())


def test_paged_state_is_the_same_and_stays_where_it_is_asked_for():
    plain, paged = parameters((64, 65), (8,)), parameters((64, 65), (8,))
    optimizers = AdamW8bit(plain), AdamW8bit(paged, paged=True)
    for step in range(3):
        give_grads(plain, paged, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert all_equal(plain, paged)
    for optimizer, other, its in zip(optimizers, reversed(optimizers), (False, True), strict=True):
        optimizer.load_state_dict(other.state_dict())
        assert [group["paged"] for group in optimizer.param_groups] == [its]


def test_groups_closure_and_missing_gradients():
    model = models.llama()
    peftops.attach(model, peftops.LoRAConfig(r=8))
    optimizer = AdamW8bit(peftops.loraplus_groups(model, 1e-3, ratio=4), min_8bit_size=256)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 4e-3]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    left_out = optimizer.param_groups[0]["params"][0]
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = model(models.tokens(), labels=models.tokens()).loss
        loss.backward()
        left_out.grad = None
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    scheduler.step()
    assert losses[2] < losses[0] and optimizer.param_groups[1]["lr"] == 2e-3
    assert left_out not in optimizer.state
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) == (not p.requires_grad or p is left_out)


def test_trains_as_adamw_does():
    """A LoRA on a small model, 60 steps: the loss falls by more than half, and at each of the last 20 steps it is
    within 5% of the first loss of what float32 moments give."""
    losses = []
    for kind in (AdamW8bit, torch.optim.AdamW):
        torch.manual_seed(0)
        model = models.llama(tied=False)
        with torch.no_grad():
            model.lm_head.weight *= 8
        peftops.attach(model, peftops.LoRAConfig(r=8))
        small = {"min_8bit_size": 0} if kind is AdamW8bit else {}
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=5e-3, **small)
        losses.append([])
        for _ in range(60):
            loss = model(models.tokens(), labels=models.tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    ours, theirs = map(torch.tensor, losses)
    assert ours[0] == theirs[0] and theirs[-1] < theirs[0] / 2
    assert ((ours - theirs).abs()[-20:] < 0.05 * theirs[0]).all(), (ours, theirs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be a number from 0, not -1.0"),
        ({"lr": torch.tensor(0.1)}, "lr must be a number from 0, not tensor"),
        ({"eps": 0}, "eps must be a number above 0, not 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number from 0, not nan"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), not \(0.9, 1.0\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), not 0.9"),
        ({"block_size": 100}, "block_size must be a power of two from 32 to 4096, not 100"),
        ({"block_size": 8192}, "block_size must be a power of two from 32 to 4096, not 8192"),
        ({"min_8bit_size": -1}, "min_8bit_size must be a whole number from 0, not -1"),
        ({"min_8bit_size": 0.5}, "min_8bit_size must be a whole number from 0, not 0.5"),
    ],
)
def test_bad_options(options, message):
    ps = parameters((4, 4))
    with pytest.raises(ValueError, match=message):
        AdamW8bit(ps, **options)
    optimizer = AdamW8bit(ps)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters((2, 2)), **options})
    assert len(optimizer.param_groups) == 1


def test_bad_parameters_and_gradients():
    with pytest.raises(TypeError, match=r"must be float32, bfloat16 or float16, not torch.float64 \[3\]"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    table = torch.nn.Embedding(8, 4, sparse=True)
    (other,) = parameters((4,))
    optimizer = AdamW8bit([other, table.weight])
    before = other.detach().clone()
    (table(torch.tensor([1])).sum() + other.sum()).backward()
    with pytest.raises(TypeError, match=r"AdamW8bit needs dense gradients; one of \[8, 4\] is torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(other, before)
