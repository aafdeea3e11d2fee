"""What goes wrong between roles and with asynchronous operations: each mistake beside its cure, in PTX by hand.

Shared memory: mbarriers at 0, 8 and 16, data from 1024 on. %r1 is the thread, %r5 where shared memory begins, %r6 the
thread's word of data, %d1 an array of 256 words, %d3 the thread's word of it. %p1: thread 0; %p2: the first warp.
"""

import ctypes

import numpy as np
import pytest

import sim

DESCRIPTOR = 1024 >> 4 | (128 >> 4) << 16 | (256 >> 4) << 32  # of 8 rows of B, k = 16, without a permutation
START = f"""ld.param.u64 %d1, [a]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; cvt.u64.u32 %d2, %r2; add.s64 %d3, %d1, %d2;
    mov.u32 %r5, smem; add.u32 %r6, %r5, %r2; add.u32 %r6, %r6, 1024; setp.eq.u32 %p1, %r1, 0; setp.lt.u32 %p2, %r1, 32;
    mov.u64 %d9, {DESCRIPTOR}; """
BARRIER, FENCE = "bar.sync 0;", "fence.proxy.async;"
INIT = "@%p1 mbarrier.init.shared.b64 [%r5], {};"


def init(*counts):
    made = " ".join(f"@%p1 mbarrier.init.shared.b64 [%r5+{8 * k}], {count};" for k, count in enumerate(counts))
    return f"{made} @%p1 {FENCE} {BARRIER}"


def wait(barrier, parity, name):
    return f"$wait{name}: mbarrier.try_wait.parity.shared.b64 %p9, [%r5+{barrier}], {parity}; @!%p9 bra $wait{name};"


def arrive(barrier):
    return f"mbarrier.arrive.shared.b64 _, [%r5+{barrier}];"


WRITE, READ = "st.shared.u32 [%r6], %r1;", "ld.shared.u32 %r8, [%r6];"
FILL = f"{WRITE} {FENCE} {BARRIER}"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, {%r20, %r21, %r22, %r23}, %d9, 1, 1, 1, 0;"
FIRST, COMMIT, DONE = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
WGMMA = FIRST + PRODUCT + COMMIT
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], {};"
COPY = "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5+1024], [%d1], {}, [%r5];"
LOAD = init(1) + EXPECT.format(256) + COPY.format(256)
STORE = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r5+1024], 256;"
STORED = "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;"
ROLES = "@!%p2 bra $second; {} bra.uni $end; $second: {} $end:"  # of two warps


@pytest.fixture
def device():
    device = sim.simulator()
    if isinstance(device, str):
        pytest.skip(device)
    device.options()
    device.forbid_all()
    yield device
    device.options()


def run(device, body, threads=128, outside=""):
    array = np.arange(256, dtype="u4")
    device.allow(array)
    module = device.load(sim.kernel(f"{START} {body} ret;", "u64 a", shared=4096, outside=outside))
    report = device.launch(module, "k", (1,), (threads,), [array])
    return array, report


# name: (the kernel, where {} is its cure; the cure; the finding without it; threads)
MISTAKES = {
    "an accumulator is read": (FILL + WGMMA + "{} add.f32 %f9, %f1, %f1;" + DONE, DONE, "an accumulator of a wgmma is touched before", 128),
    "an accumulator is written": (FILL + WGMMA + "{} mov.f32 %f3, 0f00000000;" + DONE, DONE, "an accumulator of a wgmma is touched before", 128),
    "an operand is written": (FILL + WGMMA + "{} mov.u32 %r22, 0;" + DONE, DONE, "an operand of a wgmma is touched before", 128),
    "the last group but one": (FILL + WGMMA + WGMMA.replace("%f", "%f1") + "wgmma.wait_group.sync.aligned 1; {} add.f32 %f9, %f11, %f11;" + DONE, DONE, "an accumulator", 128),
    "a register without wgmma.fence": (FILL + FIRST + "mov.u32 %r21, 5; {}" + PRODUCT + COMMIT + DONE, FIRST, "no wgmma.fence came since", 128),
    "the kernel ends first": (FILL + WGMMA + "{}", DONE, "the kernel ends before its last wgmma", 128),
    "overwritten while wgmma reads": (FILL + WGMMA + "{}" + WRITE + DONE, DONE + BARRIER, "write to what an asynchronous operation still reads|write after read", 128),
    "overwritten by another warp": (FILL + WGMMA + DONE + "{}" + "xor.b32 %r7, %r6, 256; st.shared.u32 [%r7], %r1;", BARRIER, "race: (write after read|read after write) by warp", 128),
    "written without a fence": (WRITE + "{}" + BARRIER + WGMMA + DONE, FENCE, "without a fence.proxy.async between", 128),
    "a fence of another's writes alone": ("@!%p2 " + FENCE + WRITE + "{}" + BARRIER + WGMMA + DONE, FENCE, "without a fence.proxy.async between", 128),
    "wgmma without a barrier": (WRITE + FENCE + "{}" + WGMMA + DONE, BARRIER, "race: read after write by warp|uninitialised", 128),
    "an mbarrier not yet visible": (INIT.format(1) + "{}" + BARRIER + EXPECT.format(256) + COPY.format(256) + wait(0, 0, 1), FENCE, "asynchronous proxy cannot see yet", 64),
    "an mbarrier without a barrier": (INIT.format(64) + "{}" + arrive(0), BARRIER, "no mbarrier|race: an mbarrier that warp 0 initialised", 64),
    "a copy nobody waits for": (LOAD + "{}", wait(0, 0, 1), "the kernel ends before what it began", 64),
    "read before delivery": (LOAD + "{}" + READ, wait(0, 0, 1), "read of what a bulk copy has not delivered|uninitialised", 64),
    "written before delivery": (LOAD + "{}" + WRITE, wait(0, 0, 1), "write of what a bulk copy has not delivered|write after write by warp 1", 64),
    "one lane waits for all": (LOAD + ROLES.format(wait(0, 0, 1), "@!%p1 mov.u32 %r9, %r1; setp.eq.u32 %p3, %r1, 32; @!%p3 bra $skip;" + wait(0, 0, 2) + "$skip: {}" + READ), "bar.warp.sync -1;", "race: read after write by a bulk copy of the mbarrier at 0|not delivered", 64),
    "a copy over what threads wrote": (init(1) + WRITE + "{}" + BARRIER + EXPECT.format(256) + COPY.format(256) + wait(0, 0, 1), FENCE, "bulk copy writes over what threads wrote", 64),
    "a copy over what threads read": (LOAD + wait(0, 0, 1) + READ + "{}" + EXPECT.format(256) + COPY.format(256) + wait(0, 1, 2), BARRIER, "race: write after read", 64),
    "an arrival for one lane": (init(1, 1) + ROLES.format(WRITE + "{} @%p1 " + arrive(0), wait(0, 0, 1) + "ld.shared.u32 %r8, [%r6+-128];"), "bar.warp.sync -1;", "race: read after write by warp 0", 64),
    "no wait of the other role": (init(32) + ROLES.format(WRITE + arrive(0), "{} ld.shared.u32 %r8, [%r6+-128];"), wait(0, 0, 1), "race|uninitialised", 64),
    "a named barrier of others": (ROLES.format(WRITE + "bar.arrive 1, 64;", "{} ld.shared.u32 %r8, [%r6+-128]; @%p1 bar.sync 1, 64;"), "bar.sync 1, 64;", "race|uninitialised", 64),
    "cp.async without its arrival": (init(64) + "cp.async.ca.shared.global [%r6], [%d3], 4; {}" + wait(0, 0, 1) + READ, "cp.async.mbarrier.arrive.noinc.shared.b64 [%r5];", "deadlock", 64),
    "a bulk store without a fence": (WRITE + "{}" + BARRIER + STORE + STORED, FENCE, "without a fence.proxy.async between", 64),
    "a bulk store not waited for": (FILL + STORE + "{}", STORED, "before its bulk stores have read", 64),
    "overwritten while it is stored": (FILL + STORE + "{}" + BARRIER + WRITE + STORED, STORED, "write to what an asynchronous operation still reads", 64),
    "nobody arrives": (init(1) + "{}" + wait(0, 0, 1), "@%p1 " + arrive(0), r"deadlock: all wait; warp 0 1 for phase 0 of the mbarrier at 0 \(1 of 1 arrivals missing", 64),
    "two roles wait for each other": (init(32, 32) + ROLES.format("{}" + wait(0, 0, 1) + arrive(8), wait(8, 0, 2) + arrive(0)), arrive(8), "deadlock", 64),
    "the bytes of an mbarrier": (init(1) + "{} @%p1 st.shared.u32 [%r5], 1;", "@%p1 mbarrier.inval.shared.b64 [%r5];", "the bytes of an mbarrier", 64),
    "initialised twice": (init(1) + "{} @%p1 mbarrier.init.shared.b64 [%r5], 2;", "@%p1 mbarrier.inval.shared.b64 [%r5];", "an mbarrier that is in use", 64),
    "a phase that is long over": (init(1) + "@%p1 mbarrier.arrive.shared.b64 %d5, [%r5]; @%p1 mbarrier.arrive.shared.b64 {}, [%r5]; @%p1 mbarrier.test_wait.shared.b64 %p9, [%r5], %d5;", "%d5", "followed by another already", 64),
    "a group out of step": (FILL + "setp.gt.u32 %p3, %r1, 95; @%p3 add.s64 %d9, %d9, 0; {} @%p3 add.s64 %d9, %d9, 1;" + WGMMA + DONE, "setp.gt.u32 %p3, %r1, 999;", "warps of a group do not do the same", 128),
    "a warp that leaves out": (FILL + "setp.gt.u32 %p3, %r1, 95; {} @%p3 bra $less;" + FIRST + "$less: " + WGMMA + DONE, "setp.gt.u32 %p3, %r1, 999;", "warps of a group do not do the same", 128),
    "lanes with descriptors of their own": (FILL + "cvt.u64.u32 %d8, %r1; and.b64 %d8, %d8, {}; add.s64 %d9, %d9, %d8;" + WGMMA + DONE, "0", "lanes of a warp differ in the descriptor", 128),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_and_their_cures_are_not(device, name):
    kernel, cure, what, threads = MISTAKES[name]
    for seed in (0, 1, 2):
        device.options(seed=seed, watchdog=1_000_000)
        with pytest.raises(sim.Finding, match=what):
            run(device, kernel.replace("{}", ""), threads)
        run(device, kernel.replace("{}", cure), threads)
