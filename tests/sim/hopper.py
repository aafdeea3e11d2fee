"""PTX of compute_90 by hand, for the tests of what only Hopper has.

Shared memory: mbarriers at 0, 8 and 16, data from 1024 on. %r1 is the thread, %r5 where shared memory begins, %r6 the
thread's word of data, %d1 an array of 256 words, %d3 the thread's word of it. %p1: thread 0; %p2: the first warp.
"""

import ctypes

import numpy as np

import sim

DESCRIPTOR = 1024 >> 4 | (128 >> 4) << 16 | (256 >> 4) << 32  # of 8 rows of B, k = 16, without a permutation
START = f"""ld.param.u64 %d1, [a]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; cvt.u64.u32 %d2, %r2;
    add.s64 %d3, %d1, %d2; mov.u32 %r5, smem; add.u32 %r6, %r5, %r2; add.u32 %r6, %r6, 1024; setp.eq.u32 %p1, %r1, 0;
    setp.lt.u32 %p2, %r1, 32; mov.u64 %d9, {DESCRIPTOR}; """
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
OPERANDS = "{%f1, %f2, %f3, %f4}, {%r20, %r21, %r22, %r23}, %d9, 1, 1, 1, 0"
PRODUCT = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {OPERANDS};"
FIRST, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
DONE = "wgmma.wait_group.sync.aligned 0;"
WGMMA = FIRST + PRODUCT + COMMIT
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], {};"
COPY = "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5+1024], [%d1], {}, [%r5];"
LOAD = init(1) + EXPECT.format(256) + COPY.format(256)
STORE = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r5+1024], 256;"
STORED = "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;"
ROLES = "@!%p2 bra $second; {} bra.uni $end; $second: {} $end:"  # of two warps


def run(chip, body, threads=128, outside=""):
    array = np.arange(256, dtype="u4")
    chip.allow(array)
    module = chip.load(sim.kernel(f"{START} {body} ret;", "u64 a", shared=4096, outside=outside))
    report = chip.launch(module, "k", (1,), (threads,), [array])
    return array, report


class Map(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_uint8 * 128)]


def tensor_map(chip, x, box, swizzle):
    """Of a row-major matrix; 128 bytes."""
    storage = np.zeros(256, np.uint8)
    room = storage[-storage.ctypes.data % 64 :][:128]
    u64s, u32s = lambda *v: (ctypes.c_uint64 * len(v))(*v), lambda *v: (ctypes.c_uint32 * len(v))(*v)
    status = chip.lib.sim_tensor_map(
        ctypes.c_void_p(room.ctypes.data),
        9,
        2,
        ctypes.c_void_p(x.data_ptr()),
        u64s(x.shape[1], x.shape[0]),
        u64s(x.shape[1] * 2),
        u32s(*reversed(box)),
        u32s(1, 1),
        swizzle,
    )
    if status:
        raise sim.Finding(chip.error())
    return room
