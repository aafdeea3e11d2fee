"""2,000 adapters for a 30-layer LLaMA-shaped model (SmolLM2-135M's sizes, NF4 base) in host memory, a bounded working
set of them in the pool: batches in which every row has an adapter of its own, drawn from all of them, against the same
batches with one adapter. The next batch's adapters are fetched while one decodes."""

import random

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import harness
import peftops
from peftops.nn import quantize_linears
from peftops.nn.prompt import cache_name

R, PROMPT = 16, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # as in S-LoRA


class Served(nn.Module):
    """A linear layer of the model, with each row's adapter."""

    def __init__(self, weight, layer, batch):
        super().__init__()
        self.weight, self.layer, self.batch = weight, layer, batch

    def forward(self, x):
        index = self.batch["index"][:, None].expand(x.shape[:-1])
        return peftops.multi_lora_linear(x, self.weight, self.layer, index)


class Server:
    def __init__(self, args):
        dtype = getattr(torch, args.dtype)
        config = LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
        self.model = LlamaForCausalLM(config).to(dtype).eval()
        quantize_linears(self.model.model, lambda name: True)
        linears = {n: m for n, m in self.model.named_modules() if n.endswith(TARGETS)}
        sizes = {n: (m.in_features, m.out_features) for n, m in linears.items()}
        self.pages = -(-R * sum(k + n for k, n in sizes.values()) // 16384)
        self.pool = peftops.AdapterPool(sizes, pages=self.pages * args.slots, slots=args.slots, dtype=torch.bfloat16)
        self.batch = {}
        for name, linear in linears.items():
            self.model.set_submodule(name, Served(linear.weight, self.pool.layer(name), self.batch))
        # Sixteen sets of values are drawn, and each adapter gets a copy of one: what they are is nothing to the times.
        draw = lambda *shape: 0.02 * torch.randn(shape, dtype=torch.bfloat16)
        sets = [{name: (draw(R, k), draw(n, R)) for name, (k, n) in sizes.items()} for _ in range(16)]
        for i in range(args.adapters):
            self.pool.add(str(i), sets[i % 16])
        self.args, self.random, self.loads = args, random.Random(0), 0
        self.coming = self.names()

    def names(self):
        return [str(i) for i in self.random.sample(range(self.args.adapters), self.args.rows)]

    def describe(self):
        pool, one = self.pool, self.pages * self.pool.storage[0].nbytes
        return (
            f"{self.args.adapters} adapters r={R}, {one / 1e6:.2f} MB each, "
            f"{self.args.adapters * one / 1e9:.2f} GB in host memory; working set {len(pool.storage)} pages = "
            f"{pool.storage.nbytes / 1e6:.0f} MB, {len(pool.resident)} adapters resident; "
            f"batches of {self.args.rows} rows, {PROMPT} tokens in, {self.args.tokens} out"
        )

    @torch.no_grad()
    def serve(self, names):
        cache, ids = DynamicCache(), torch.randint(0, 49152, (len(names), PROMPT), device=self.model.device)
        with self.pool.use(names) as self.batch["index"]:
            for _ in range(self.args.tokens):
                logits = self.model(
                    input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_name(self.model): cache}
                ).logits
                ids = logits[:, -1:].argmax(-1)

    def many(self):
        for _ in range(self.args.batches):
            now, self.coming = self.coming, self.names()
            fetched = self.pool.prefetch(self.coming)
            self.serve(now)
            fetched.result()
            assert len(self.pool.resident) <= self.args.slots

    def load(self):
        for name in self.names():
            self.pool.load(name)

    def one(self):
        for _ in range(self.args.batches):
            self.serve(["0"] * self.args.rows)


def cases(args):
    server = Server(args)
    server.many(), server.one()
    print(server.describe())
    tokens = args.batches * args.rows * args.tokens
    yield harness.Case(
        f"{args.rows} adapters of {args.adapters}, {tokens} tokens",
        {"peftops": server.many, "one adapter": server.one},
        want={"one adapter": 0.7},
    )
    times = harness.measure({"many": server.many, "one": server.one}, 3)
    print(f"{tokens / times['many']:.0f} tokens/s, {tokens / times['one']:.0f} with one adapter")
    one = server.pages * server.pool.storage[0].nbytes
    seconds = harness.measure({"load": server.load})["load"] / args.rows
    print(f"a load, mostly after an eviction: {seconds * 1e3:.2f} ms, {one / seconds / 1e9:.1f} GB/s")


if __name__ == "__main__":
    parser = harness.parser()
    parser.set_defaults(rounds=5)
    parser.add_argument("--adapters", type=int, default=2000, help="3.7 MB of host memory each")
    parser.add_argument("--slots", type=int, default=64, help="adapters in the working set")
    parser.add_argument("--rows", type=int, default=32, help="requests in a batch")
    parser.add_argument("--tokens", type=int, default=16, help="that each request gets")
    parser.add_argument("--batches", type=int, default=1, help="in one measurement")
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    harness.run("adapter_pool", cases(parser.parse_args()), parser)
