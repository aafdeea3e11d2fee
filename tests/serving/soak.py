"""Many clients and adapters at once against a real server: answers are what `generate` makes alone, nothing is lost,
and memory does not grow.

    python tests/serving/soak.py --requests 10000 --clients 32 --adapters 200
"""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path

import psutil
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from http_process import copy_adapter, make_adapter, make_model, serving  # noqa: E402

import models  # noqa: E402
import peftops  # noqa: E402

PROMPTS = ["abc", "q", "a longer prompt, of some words", "äöü", "xy" * 20]
NEW = 8


def make(folder, count):
    """A model and adapters, each with numbers of its own."""
    make_model(folder)
    make_adapter(folder / "first", 0, 2, target=["q_proj", "v_proj"])
    for i in range(count):
        draw = torch.Generator().manual_seed(i)
        other = lambda name, t, draw=draw: 0.4 * torch.randn(t.shape, generator=draw)
        copy_adapter(folder / "first", folder / "adapters" / f"task{i}", other)


def alone(folder, names):
    """The texts of `generate`, by adapter and prompt."""
    tokenizer, texts = models.tokenizer(), {}
    for name in names:
        model = peftops.load(models.llama(tied=False), folder / "adapters" / name)
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
            texts[name, prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return texts


async def replay(url, requests, clients, count, seed=0):
    """Ask, some of it in streams, some of which are left; the texts of the whole answers, by adapter and prompt."""
    import openai

    texts, left, draw, places = [], 0, random.Random(seed), asyncio.Semaphore(clients)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def ask(name, prompt, kind):
            nonlocal left
            async with places:
                got = await client.completions.create(
                    model=name, prompt=prompt, max_tokens=NEW, temperature=0, stream=kind != "whole"
                )
                if kind == "whole":
                    texts.append((name, prompt, got.choices[0].text))
                    return
                parts = []
                async for part in got:
                    parts.append(part.choices[0].text)
                    if kind == "left":
                        await got.close()
                        left += 1
                        return
                texts.append((name, prompt, "".join(parts)))

        kinds = ["whole", "whole", "stream", "left"]
        choices = [
            (f"task{min(int(draw.paretovariate(0.8)) - 1, count - 1)}", draw.choice(PROMPTS), draw.choice(kinds))
            for _ in range(requests)
        ]
        await asyncio.gather(*(ask(*choice) for choice in choices))
    assert len(texts) + left == requests
    return texts


def soak(folder, *, requests, clients, count, checked, slack):
    """A third of the requests to warm up; over the others the process may grow by ``slack`` bytes."""
    make(folder, count)
    with serving(
        "--model",
        folder / "model",
        "--adapters",
        folder / "adapters",
        "--max-queue",
        requests,
        "--resident",
        8,
        "--max-rank",
        2,
    ) as server:
        process = psutil.Process(server.process.pid)
        warm_up = requests // 3
        texts = asyncio.run(replay(server.url, warm_up, clients, count))
        before = process.memory_info().rss
        texts += asyncio.run(replay(server.url, requests - warm_up, clients, count, seed=1))
        grown = process.memory_info().rss - before
    seen = {}
    for name, prompt, text in texts:
        assert seen.setdefault((name, prompt), text) == text, "two answers to one question"
    names = sorted({name for name, _ in seen})
    want = alone(folder, names[:: max(1, len(names) // checked)][:checked])
    compared = [(seen[key], text) for key, text in want.items() if key in seen]
    assert compared and all(got == text for got, text in compared)
    assert grown <= slack, f"the process has grown by {grown / 2**20:.1f} MiB"
    return len(seen), len(compared), grown


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs, compared, grown = soak(
            Path(folder), requests=args.requests, clients=args.clients, count=args.adapters, checked=50, slack=16 << 20
        )
    memory = f"grown {grown / 2**20:.1f} MiB"
    print(f"{args.requests} requests, {pairs} questions, {compared} compared with generate, {memory}")


if __name__ == "__main__":
    main()
