"""Convolutions over a group-quantised weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import GroupQuantTensor, group_quantize
from .quantized import StoredInParts, own_rows


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The patch under each output pixel of ``conv``, as a row: ``[N, C, H, W]`` to ``[N, out_H, out_W, C * kernel]``.

    A convolution is then a linear layer over ``conv.weight.flatten(1)``, pixel by pixel. For a 1x1 kernel this is a
    permutation and copies nothing.
    """
    if conv.padding_mode != "zeros" or conv.groups != 1 or isinstance(conv.padding, str):
        raise ValueError(
            "patches: only convolutions with one group and a number of zeros for padding become linear layers, not "
            f"groups={conv.groups}, padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
        )
    single = x.dim() == 3
    x = x[None] if single else x
    spans = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[-2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]
    if conv.kernel_size == (1, 1) and conv.padding == (0, 0):
        rows = x[..., :: conv.stride[0], :: conv.stride[1]].permute(0, 2, 3, 1)
    else:
        columns = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        rows = columns.transpose(1, 2).unflatten(1, spans)
    return rows[0] if single else rows


class GroupConv2d(StoredInParts):
    """``nn.Conv2d`` over a :class:`~peftops.GroupQuantTensor` ``[out, in * kernel]``, by :func:`patches`.

    The number of weights to an output, ``in * kernel_h * kernel_w``, is a multiple of the group size.
    """

    def __init__(self, conv: nn.Conv2d, weight: GroupQuantTensor):
        super().__init__()
        n, k = conv.out_channels, conv.weight[0].numel()
        if weight.shape != (n, k):
            raise ValueError(f"GroupConv2d: weight must have shape [{n}, {k}], not {list(weight.shape)}")
        self._like = [
            nn.Conv2d(  # takes the patches and holds no weight; in a list, so that it is no submodule
                conv.in_channels,
                n,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                bias=False,
                padding_mode=conv.padding_mode,
                device="meta",
            )
        ]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, **how: object) -> GroupConv2d:
        """Quantise ``conv`` by :func:`peftops.group_quantize`, whose options ``how`` are; the bias is shared."""
        return cls(conv, group_quantize(conv.weight.flatten(1), **how)).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.product(patches(x, self._like[0]), self.bias).movedim(-1, -3)

    def extra_repr(self) -> str:
        conv, weight = self._like[0], own_rows(self.weight)
        return f"{conv.extra_repr()}, bits={weight.bits}, group_size={weight.group_size}"
