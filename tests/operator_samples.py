"""Small arguments for every operator, for the tests that call them past their public functions."""

import torch

import peftops

ON_HOST = {"index", "wanted", "handles", "pages", "where", "scaling"}  # what multi_lora reads on the CPU, as tensors


def samples():
    """Arguments of every operator; those that it can do without are all there."""
    n, k, r, m = 8, 64, 2, 3
    x, g, u, A, B, bias = (torch.randn(s) for s in ((m, k), (m, n), (m, r), (r, k), (n, r), (n,)))
    nf4 = peftops.nf4_quantize(torch.randn(n, k))._arguments
    group = peftops.group_quantize(torch.randn(n, k))._arguments
    mxfp4 = peftops.mxfp4_quantize(torch.randn(n, k))._arguments
    seed, f32 = torch.tensor(7), torch.float32
    prompt = (torch.randn(1, 2, 5, 16), torch.randn(2, 4, 16), torch.randn(2, 4, 16), torch.randn(2), 0.25)
    out = torch.randn(1, 2, 5, 16)
    pool = peftops.AdapterPool({"layer": (k, n)}, pages=8, page_size=128, slots=2)
    pool.add("a", {"layer": (A, B)})
    index, layer = torch.tensor([pool.load("a")] * m), pool.layer("layer")
    ends, stack = torch.tensor([1, m]), peftops.nf4_quantize(torch.randn(2, n, k))._arguments
    groups, dense = peftops.group_quantize(torch.randn(2 * n, k))._arguments, torch.randn(2, n, k)
    floats = peftops.mxfp4_quantize(torch.randn(2 * n, k))._arguments
    A2, B2 = A.repeat(2, 1), B.repeat(2, 1)
    moments = [torch.randn(n, k)], [torch.rand(n, k)], [], []  # float32: the results follow from floats alone
    return {
        "adamw8bit_": ([torch.randn(n, k)], [torch.randn(n, k)], *moments, k, 1, 0.1, 0.9, 0.999, 1e-8, 0.0),
        "nf4_quantize": (torch.randn(n, k), 64),
        "nf4_quantize_absmax": (torch.rand(300), torch.rand(1)),
        "nf4_absmax": (torch.zeros(300, dtype=torch.uint8), torch.rand(2), torch.rand(1)),
        "nf4_dequantize": (*nf4, n, k, f32),
        "nf4_linear": (x, *nf4, n, k, bias, u, B, 0.5),
        "nf4_linear_backward": (g, *nf4, k, u, A, 0.5, seed),
        "lora_shrink": (x, A, True, 0.5, 0.5, seed),
        "lora_expand_": (x.clone(), u, A, True, 0.5, 0.5, seed),
        "lora_gradient": (u, x, f32, True, 0.5, 0.5, seed),
        "group_quantize": (torch.randn(n, k), 4, 32, False, 0),
        "group_dequantize": (*group, f32),
        "group_linear": (x, *group, bias, u, B, 0.5),
        "group_linear_backward": (g, *group, u, A),
        "mxfp4_quantize": (torch.randn(n, k),),
        "mxfp4_dequantize": (*mxfp4, f32),
        "mxfp4_linear": (x, *mxfp4, bias, u, B, 0.5),
        "mxfp4_linear_backward": (g, *mxfp4, u, A, 0.5, seed),
        "qalora_shrink": (x, torch.randn(r, k // 32), 32),
        "qalora_merge": (*group[1:3], torch.randn(r, k // 32), B, 0.5),
        "gated_prompt_add": (out, *prompt),
        "gated_prompt_add_": (out.clone(), *prompt),
        "gated_prompt_backward": (out, *prompt, True),
        "gated_prompt_backward_": (out.clone(), out, *prompt),
        "paged_attention": (
            out,
            torch.randn(3, 2, 4, 16),
            torch.randn(3, 2, 4, 16),
            torch.tensor([[2, 0]]).int(),
            torch.tensor([7]).int(),
            0.25,
            8,
        ),
        "multi_lora_add_": (g.clone(), x, index, layer.storage, *layer.slots, False, r),
        "multi_lora_gradient": (u, x, index, index[:1], *layer.slots, True, r),
        "experts_nf4": (x, *stack, n, k, ends, bias.repeat(2), u, B2, 0.5),
        "experts_nf4_backward": (g, *stack, k, ends, u, A2),
        "experts_group": (x, *groups, ends, bias.repeat(2), u, B2, 0.5),
        "experts_group_backward": (g, *groups, ends, u, A2),
        "experts_mxfp4": (x, *floats, ends, bias.repeat(2), u, B2, 0.5),
        "experts_mxfp4_backward": (g, *floats, ends, u, A2),
        "experts_dense": (x, dense, ends, bias.repeat(2), u, B2, 0.5),
        "experts_dense_backward": (g, dense, ends, u, A2),
        "experts_shrink": (x, A2, ends, True, 0.5),
        "experts_gradient": (u, x, ends, f32, True, 0.5),
    }


def operators():
    names = [name.removeprefix("peftops::") for name in torch._C._dispatch_get_all_op_names() if "peftops::" in name]
    return {name: getattr(torch.ops.peftops, name).default for name in names}


def on_gpu(call, arguments):
    """The same arguments with their tensors on the GPU, but for those that an operator reads on the host."""
    names = [argument.name for argument in call._schema.arguments]
    moved = lambda value: [t.cuda() for t in value] if isinstance(value, list) else value.cuda()
    return [
        moved(value) if isinstance(value, (list, torch.Tensor)) and name not in ON_HOST else value
        for name, value in zip(names, arguments, strict=False)
    ]


def written(call):
    """The positions of the arguments that an operator writes to."""
    aliases = [argument.alias_info for argument in call._schema.arguments]
    return [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]


def tensors_of(values):
    """All tensors of some values, those in lists too."""
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return [t for ts in lists for t in ts if isinstance(t, torch.Tensor)]
