"""Memory of keys and values in pages, by the tokens of a page: bytes held over bytes needed for mixes of lengths, at
their fullest; and CPU seconds of decoding, over those with 16 tokens a page.

    python bench/bench_pages.py                # memory, and CPU seconds of decoding
    python bench/bench_pages.py --rounds 0     # memory alone
"""

import argparse
import random
import statistics
import time

import torch

from peftops.serving import Server, pool_for
from peftops.serving.pages import Layout

SIZES = (1, 2, 4, 8, 16, 32)
LAYOUTS = {  # heads of keys and dims, by layer
    "2 heads of 64": [(2, 64, 64)] * 24,
    "3 heads of 64": [(3, 64, 64)] * 30,
    "8 heads of 128": [(8, 128, 128)] * 32,
    "32 heads of 80": [(32, 80, 80)] * 32,
}
MIXES = {
    "1 to 32": lambda draw: draw.randint(1, 32),
    "33 to 256": lambda draw: draw.randint(33, 256),
    "257 to 2048": lambda draw: draw.randint(257, 2048),
    "all of these": lambda draw: MIXES[draw.choice(list(MIXES)[:3])](draw),
    "a power law": lambda draw: min(int(8 * draw.paretovariate(1.0)), 2048),
}


def memory(heads, mix, page, requests=1000):
    """Bytes held over bytes needed, with pages of so many elements."""
    layout, draw = Layout(tuple(heads), (None,) * len(heads), torch.float32), random.Random(0)
    each = sum(n * (d + dv) for n, d, dv in heads)
    lengths = [MIXES[mix](draw) for _ in range(requests)]
    return sum(layout.pages(n, 4 * page) * page for n in lengths) / sum(n * each for n in lengths)


def decoding(page_sizes, rounds, new=24, requests=16):
    """CPU seconds of the same requests, by page size, in turn; the median of each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    base, draw, seconds = LlamaForCausalLM(config).eval(), random.Random(0), {size: [] for size in page_sizes}
    prompts = [[draw.randrange(4096) for _ in range(draw.randint(16, 512))] for _ in range(requests)]
    for _ in range(rounds):
        for size in page_sizes:
            pool = pool_for(base, adapters=1, rank=8, page_size=size)
            with Server(base, pool, stop=[], max_batch=requests) as server:
                for prompt in prompts:
                    server.submit(prompt, max_new=new)
                server.step()
                begin = time.process_time()
                list(server.run())
                seconds[size].append(time.process_time() - begin)
    return {size: statistics.median(times) for size, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="of decoding with each size")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="tokens of a page, for decoding")
    args = parser.parse_args()
    print(f"{'bytes held / needed':32}" + "".join(f"{size:>9}" for size in SIZES) + "   tokens a page, at least")
    for label, heads in LAYOUTS.items():
        widest = max(n * (d + dv) for n, d, dv in heads)
        for mix in MIXES:
            pages = [1 << (size * widest - 1).bit_length() for size in SIZES]
            print(f"{label:16}{mix:16}" + "".join(f"{memory(heads, mix, page):9.3f}" for page in pages))
    if args.rounds:
        found = decoding([256 * size for size in sorted({*args.sizes, 16})], args.rounds)
        for page, seconds in found.items():
            print(f"decoding, {page // 256} tokens a page: {seconds / found[256 * 16]:.3f} of the CPU seconds with 16")


if __name__ == "__main__":
    main()
