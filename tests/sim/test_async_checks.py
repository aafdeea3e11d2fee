"""What goes wrong between roles and with asynchronous operations: each mistake beside its cure. hopper.py has the words."""

import pytest

import sim
from sim.hopper import (
    BARRIER,
    COMMIT,
    COPY,
    DONE,
    EXPECT,
    FENCE,
    FILL,
    FIRST,
    INIT,
    LOAD,
    PRODUCT,
    READ,
    ROLES,
    STORE,
    STORED,
    WGMMA,
    WRITE,
    arrive,
    init,
    run,
    wait,
)

# name: (the kernel, where {} is its cure; the cure; the finding without it; threads)
MISTAKES = {
    "an accumulator is read": (
        FILL + WGMMA + "{} add.f32 %f9, %f1, %f1;" + DONE,
        DONE,
        "an accumulator of a wgmma is touched before",
        128,
    ),
    "an accumulator is written": (
        FILL + WGMMA + "{} mov.f32 %f3, 0f00000000;" + DONE,
        DONE,
        "an accumulator of a wgmma is touched before",
        128,
    ),
    "an operand is written": (
        FILL + WGMMA + "{} mov.u32 %r22, 0;" + DONE,
        DONE,
        "an operand of a wgmma is touched before",
        128,
    ),
    "the last group but one": (
        FILL
        + WGMMA
        + WGMMA.replace("%f", "%f1")
        + "wgmma.wait_group.sync.aligned 1; {} add.f32 %f9, %f11, %f11;"
        + DONE,
        DONE,
        "an accumulator",
        128,
    ),
    "a register without wgmma.fence": (
        FILL + FIRST + "mov.u32 %r21, 5; {}" + PRODUCT + COMMIT + DONE,
        FIRST,
        "no wgmma.fence came since",
        128,
    ),
    "the kernel ends first": (FILL + WGMMA + "{}", DONE, "the kernel ends before its last wgmma", 128),
    "overwritten while wgmma reads": (
        FILL + WGMMA + "{}" + WRITE + DONE,
        DONE + BARRIER,
        "write to what an asynchronous operation still reads|write after read",
        128,
    ),
    "overwritten by another warp": (
        FILL + WGMMA + DONE + "{}" + "xor.b32 %r7, %r6, 256; st.shared.u32 [%r7], %r1;",
        BARRIER,
        "race: (write after read|read after write) by warp",
        128,
    ),
    "written without a fence": (
        WRITE + "{}" + BARRIER + WGMMA + DONE,
        FENCE,
        "without a fence.proxy.async between",
        128,
    ),
    "a fence of another's writes alone": (
        "@!%p2 " + FENCE + WRITE + "{}" + BARRIER + WGMMA + DONE,
        FENCE,
        "without a fence.proxy.async between",
        128,
    ),
    "wgmma without a barrier": (
        WRITE + FENCE + "{}" + WGMMA + DONE,
        BARRIER,
        "race: read after write by warp|uninitialised",
        128,
    ),
    "an mbarrier not yet visible": (
        INIT.format(1) + "{}" + BARRIER + EXPECT.format(256) + COPY.format(256) + wait(0, 0, 1),
        FENCE,
        "asynchronous proxy cannot see yet",
        64,
    ),
    "an mbarrier without a barrier": (
        INIT.format(64) + "{}" + arrive(0),
        BARRIER,
        "no mbarrier|race: an mbarrier that warp 0 initialised",
        64,
    ),
    "a copy nobody waits for": (LOAD + "{}", wait(0, 0, 1), "the kernel ends before what it began", 64),
    "read before delivery": (
        LOAD + "{}" + READ,
        wait(0, 0, 1),
        "read of what a bulk copy has not delivered|uninitialised",
        64,
    ),
    "written before delivery": (
        LOAD + "{}" + WRITE,
        wait(0, 0, 1),
        "write of what a bulk copy has not delivered|write after write by warp 1",
        64,
    ),
    "one lane waits for all": (
        LOAD
        + ROLES.format(
            wait(0, 0, 1),
            "@!%p1 mov.u32 %r9, %r1; setp.eq.u32 %p3, %r1, 32; @!%p3 bra $skip;" + wait(0, 0, 2) + "$skip: {}" + READ,
        ),
        "bar.warp.sync -1;",
        "race: read after write by a bulk copy of the mbarrier at 0|not delivered",
        64,
    ),
    "a copy over what threads wrote": (
        init(1) + WRITE + "{}" + BARRIER + EXPECT.format(256) + COPY.format(256) + wait(0, 0, 1),
        FENCE,
        "bulk copy writes over what threads wrote",
        64,
    ),
    "a copy over what threads read": (
        LOAD + wait(0, 0, 1) + READ + "{}" + EXPECT.format(256) + COPY.format(256) + wait(0, 1, 2),
        BARRIER,
        "race: write after read",
        64,
    ),
    "an arrival for one lane": (
        init(1, 1) + ROLES.format(WRITE + "{} @%p1 " + arrive(0), wait(0, 0, 1) + "ld.shared.u32 %r8, [%r6+-128];"),
        "bar.warp.sync -1;",
        "race: read after write by warp 0",
        64,
    ),
    "no wait of the other role": (
        init(32) + ROLES.format(WRITE + arrive(0), "{} ld.shared.u32 %r8, [%r6+-128];"),
        wait(0, 0, 1),
        "race|uninitialised",
        64,
    ),
    "a named barrier of others": (
        ROLES.format(WRITE + "bar.arrive 1, 64;", "{} ld.shared.u32 %r8, [%r6+-128]; @%p1 bar.sync 1, 64;"),
        "bar.sync 1, 64;",
        "race|uninitialised",
        64,
    ),
    "cp.async without its arrival": (
        init(64) + "cp.async.ca.shared.global [%r6], [%d3], 4; {}" + wait(0, 0, 1) + READ,
        "cp.async.mbarrier.arrive.noinc.shared.b64 [%r5];",
        "deadlock",
        64,
    ),
    "a bulk store without a fence": (
        WRITE + "{}" + BARRIER + STORE + STORED,
        FENCE,
        "without a fence.proxy.async between",
        64,
    ),
    "a bulk store not waited for": (FILL + STORE + "{}", STORED, "before its bulk stores have read", 64),
    "overwritten while it is stored": (
        FILL + STORE + "{}" + BARRIER + WRITE + STORED,
        STORED,
        "write to what an asynchronous operation still reads",
        64,
    ),
    "nobody arrives": (
        init(1) + "{}" + wait(0, 0, 1),
        "@%p1 " + arrive(0),
        r"deadlock: all wait; warp 0 1 for phase 0 of the mbarrier at 0 \(1 of 1 arrivals missing",
        64,
    ),
    "two roles wait for each other": (
        init(32, 32) + ROLES.format("{}" + wait(0, 0, 1) + arrive(8), wait(8, 0, 2) + arrive(0)),
        arrive(8),
        "deadlock",
        64,
    ),
    "the bytes of an mbarrier": (
        init(1) + "{} @%p1 st.shared.u32 [%r5], 1;",
        "@%p1 mbarrier.inval.shared.b64 [%r5];",
        "the bytes of an mbarrier",
        64,
    ),
    "initialised twice": (
        init(1) + "{} @%p1 mbarrier.init.shared.b64 [%r5], 2;",
        "@%p1 mbarrier.inval.shared.b64 [%r5];",
        "an mbarrier that is in use",
        64,
    ),
    "a phase that is long over": (
        init(1)
        + "@%p1 mbarrier.arrive.shared.b64 %d5, [%r5]; @%p1 mbarrier.arrive.shared.b64 {}, [%r5]; @%p1 mbarrier.test_wait.shared.b64 %p9, [%r5], %d5;",
        "%d5",
        "followed by another already",
        64,
    ),
    "a group out of step": (
        FILL + "setp.gt.u32 %p3, %r1, 95; @%p3 add.s64 %d9, %d9, 0; {} @%p3 add.s64 %d9, %d9, 1;" + WGMMA + DONE,
        "setp.gt.u32 %p3, %r1, 999;",
        "warps of a group do not do the same",
        128,
    ),
    "a warp that leaves out": (
        FILL + "setp.gt.u32 %p3, %r1, 95; {} @%p3 bra $less;" + FIRST + "$less: " + WGMMA + DONE,
        "setp.gt.u32 %p3, %r1, 999;",
        "warps of a group do not do the same",
        128,
    ),
    "lanes with descriptors of their own": (
        FILL + "cvt.u64.u32 %d8, %r1; and.b64 %d8, %d8, {}; add.s64 %d9, %d9, %d8;" + WGMMA + DONE,
        "0",
        "lanes of a warp differ in the descriptor",
        128,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_and_their_cures_are_not(chip, name):
    kernel, cure, what, threads = MISTAKES[name]
    for seed in (0, 1, 2):
        chip.options(seed=seed, watchdog=1_000_000)
        with pytest.raises(sim.Finding, match=what):
            run(chip, kernel.replace("{}", ""), threads)
        run(chip, kernel.replace("{}", cure), threads)
