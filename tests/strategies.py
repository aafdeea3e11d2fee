"""Inputs worth drawing: sizes at and around every vector width, strip and panel; empty dims; odd strides."""

import torch
from hypothesis import strategies as st

_EDGES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 160, 192, 255, 256, 257]

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**31 - 1)
layouts = st.sampled_from(["plain", "transposed", "offset"])
block_sizes = st.sampled_from([32, 64, 128, 256, 1024, 4096])
bit_widths = st.sampled_from([2, 3, 4, 8])
group_sizes = st.sampled_from([8, 16, 32, 64, 128, 256, 1024])


@st.composite
def grouped_ins(draw):
    """A group size and a number of columns that it divides, at and around every strip and panel."""
    group = draw(group_sizes)
    return group, group * draw(st.integers(1, max(1, 640 // group)))


rows = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 24, 25, 29, 33])  # around the ladder's limits
outs = st.one_of(st.sampled_from(_EDGES), st.integers(1, 300))
ins = st.one_of(st.sampled_from([*_EDGES, 288, 320, 512, 576]), st.integers(1, 600))
ranks = st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 40])


def normal(shape, dtype, seed, device="cpu"):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen).to(device, dtype)


def strided(t, how):
    """The same values behind another layout: 'plain', 'transposed', or 'offset' (unaligned)."""
    if how == "transposed" and t.dim() >= 2:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "offset":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t
