"""A trace of requests as they arrive (Poisson), for adapters of which few are asked for often (a power law): tokens a
second, time to the first token, and time per token, at p50 and p99. Against HF PEFT, which takes one request after the
other and switches adapters in between, and against llama.cpp's server with one adapter (``pip install xllamacpp``), all
in float32. On a machine that others use, tokens per second of CPU time are the figure to compare, with
OMP_NUM_THREADS=1.

    python bench/serving_trace.py --adapters 1 16 200 --requests 64 --rate 20
    python bench/serving_trace.py --adapters 1 16 200 2000 --model tiny --picture docs/images/serving_trace.svg
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

import peftops
from bench_serving import model
from peftops.serving import Server, pool_for

PAGED = ("pages", True), ("rows", False)
RANK, TARGET = 8, ["q_proj", "v_proj"]


def factors(base, seed):
    draw, found = torch.Generator().manual_seed(seed), {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in TARGET:
            out, width = module.weight.shape
            found[name] = (torch.randn(RANK, width, generator=draw) / 24, torch.randn(out, RANK, generator=draw) / 50)
    return found


def trace(requests, adapters, rate, seed=0):
    """When each request comes, its adapter, its prompt, and how many tokens it wants."""
    draw, at = random.Random(seed), 0.0
    for _ in range(requests):
        at += draw.expovariate(rate)
        prompt = [draw.randrange(1, 4096) for _ in range(min(int(8 * draw.paretovariate(1.0)), 256))]
        yield at, min(int(draw.paretovariate(1.0)) - 1, adapters - 1), prompt, draw.randrange(4, 33)


def ours(base, asked, adapters, paged, most):
    pool = pool_for(base, adapters=min(adapters, 16), rank=RANK, target=TARGET, tokens=most if paged else 0)
    for i in range(adapters):
        pool.add(str(i), factors(base, i))
    times, waiting = [[] for _ in asked], list(enumerate(asked))[::-1]
    with Server(base, pool, stop=[], paged=paged, max_tokens=most) as server:
        start, cpu = time.perf_counter(), time.process_time()
        while waiting or not server.idle:
            now = time.perf_counter() - start
            while waiting and waiting[-1][1][0] <= now:
                i, (_, adapter, prompt, new) = waiting.pop()
                told = lambda *_, i=i: times[i].append(time.perf_counter() - start)  # returns None: goes on
                server.submit(prompt, adapter=str(adapter), max_new=new, watch=told)
            if server.idle:
                time.sleep(max(0.0, waiting[-1][1][0] - now))
            else:
                server.step()
        return times, time.process_time() - cpu


def peft(base, asked, adapters):
    from peft import LoraConfig, get_peft_model
    from transformers.generation.streamers import BaseStreamer

    config = LoraConfig(r=RANK, target_modules=TARGET)
    adapted = get_peft_model(base, config, adapter_name="0")
    for i in range(1, adapters):
        adapted.add_adapter(str(i), config)

    class Times(BaseStreamer):
        def __init__(self, into):
            self.into, self.prompt = into, True

        def put(self, value):
            if not self.prompt:
                self.into.append(time.perf_counter() - start)
            self.prompt = False

        def end(self):
            pass

    times, start, cpu = [[] for _ in asked], time.perf_counter(), time.process_time()
    for i, (at, adapter, prompt, new) in enumerate(asked):
        time.sleep(max(0.0, at - (time.perf_counter() - start)))
        adapted.set_adapter(str(adapter))
        ids = torch.tensor([prompt])
        with torch.no_grad():
            adapted.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=Times(times[i]),
            )
    return times, time.process_time() - cpu


def tokenizer(size):
    """A GGUF has one; nobody asks it anything here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words.append(words[0] + words[1])  # llama.cpp wants a merge
    vocabulary = {word: i for i, word in enumerate([*words, *(f"[{i}]" for i in range(size - len(words)))])}
    made = Tokenizer(models.BPE(vocabulary, [(words[0], words[1])]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[0]")


def llama_cpp(base, asked, most, slots=16):
    import xllamacpp

    from peftops.integrations.gguf_model import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_gguf(base, tokenizer(base.config.vocab_size), folder / "model.gguf")
        peftops.attach(base, peftops.LoRAConfig(r=RANK, target=TARGET))
        peftops.save_gguf(base, folder / "adapter.gguf")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.kv_unified = (
            str(folder / "model.gguf"),
            most,
            slots,
            True,
        )
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(folder / "adapter.gguf"), 1.0)]
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.n_gpu_layers, params.verbosity, params.fit_params = 0, -1, False
        server = xllamacpp.Server(params)
    times, start, cpu = [[] for _ in asked], time.perf_counter(), time.process_time()

    def ask(i):
        at, _, prompt, new = asked[i]
        time.sleep(max(0.0, at - (time.perf_counter() - start)))
        told = lambda _: times[i].append(time.perf_counter() - start)  # returns None: goes on
        wanted = dict(prompt=prompt, n_predict=new, temperature=0.0, ignore_eos=True, cache_prompt=False, stream=True)
        server.handle_completions(wanted, told)
        del times[i][new:]  # what comes after the tokens says that it is over

    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(ask, range(len(asked))))
    return times, time.process_time() - cpu


def tiny():
    """So small that thousands of adapters fit into memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_attention_heads=2, num_key_value_heads=2, **sizes)).eval()


MODELS = {"small": model, "tiny": tiny}
PANELS = {
    "tokens a second of CPU time": ("rate",),
    "seconds to the first token": ("first p50", "first p99"),
    "seconds from token to token": ("each p50", "each p99"),
}


def draw(found, title, file):
    """A panel for each figure: bars for each way, with an outline up to p99 where there are two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"svg.hashsalt": "peftops", "svg.fonttype": "none"}
    counts, ways = sorted({count for count, _ in found}), list(dict.fromkeys(way for _, way in found))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 4), layout="constrained")
    for axis, (label, keys) in zip(axes, PANELS.items(), strict=True):
        for i, way in enumerate(ways):
            at = [x for x, count in enumerate(counts) if (count, way) in found]
            heights = [[found[counts[x], way][key] for x in at] for key in keys]
            places = [x + 0.27 * (i - (len(ways) - 1) / 2) for x in at]
            axis.bar(places, heights[0], 0.25, color=f"C{i}", label=way)
            if len(keys) == 2:
                axis.bar(places, heights[1], 0.25, fill=False, edgecolor=f"C{i}", linewidth=1)
                axis.set_yscale("log")
        axis.set_xticks(range(len(counts)), counts)
        axis.set(xlabel="adapters")
        axis.set_title(label + (": p50, outline p99" if len(keys) == 2 else ""), fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(title, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def report(name, adapters, asked, measured):
    times, cpu = measured
    arrived = [at for at, *_ in asked]
    tokens, seconds = sum(map(len, times)), max(map(max, times)) - arrived[0]
    first = [ts[0] - at for ts, at in zip(times, arrived, strict=True)]
    each = [b - a for ts in times for a, b in itertools.pairwise(ts)]
    at = {"first": statistics.quantiles(first, n=100), "each": statistics.quantiles(each, n=100)}
    ends = lambda word: "{0[49]:8.3f} {0[98]:8.3f}".format(at[word])
    rate = f"{tokens / seconds:8.1f} tokens/s {tokens / cpu:8.1f} tokens/s of CPU"
    print(f"{name:9} {adapters:4} adapters {rate}   first {ends('first')} s   each {ends('each')} s", flush=True)
    return {"rate": tokens / cpu, **{f"{word} p{p}": at[word][p - 1] for word in at for p in (50, 99)}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 16, 200])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--tokens", type=int, default=16384, help="whose keys and values are kept at once")
    parser.add_argument("--peft", type=int, default=16, help="the most adapters with which PEFT is tried, too")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--picture", type=Path, help="a file, .svg or .png, to draw what was measured")
    parser.add_argument("--machine", default="", help="words for the picture's title")
    args = parser.parse_args()
    build, found = MODELS[args.model], {}
    title = f"{args.requests} requests, {args.rate:g} a second, {torch.get_num_threads()} threads"
    print(f"{title}; times at p50 and p99")
    for adapters in args.adapters:
        asked = list(trace(args.requests, adapters, args.rate))
        ways = {name: partial(ours, asked=asked, adapters=adapters, paged=p, most=args.tokens) for name, p in PAGED}
        if adapters <= args.peft:
            ways["PEFT"] = partial(peft, asked=asked, adapters=adapters)
        if adapters == 1 and find_spec("xllamacpp"):
            ways["llama.cpp"] = partial(llama_cpp, asked=asked, most=args.tokens)
        for name, run in ways.items():
            found[adapters, name] = report(name, adapters, asked, run(build()))
    if args.picture is not None:
        draw(found, f"A trace of {title}, a {args.model} model. {args.machine}", args.picture)


if __name__ == "__main__":
    main()
