"""Tokens a second of 16 requests with 16 adapters in one batch, against one adapter for all, and against HF PEFT:
its loop (an adapter and a request at a time) and its mixed batches (all requests at once, a product per adapter).

A llama of 4 layers and hidden size 576, rank 8 on all linears, prompts of 4 to 32 tokens, 8 new tokens each.
"""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import harness
import peftops
from peftops.serving import Server, add_adapter, pool_for

COUNT, NEW, RANK = 16, 8, 8


def model(layers=4):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


def adapters(base, folder):
    """Files of COUNT adapters, which peftops and PEFT both read."""
    for i in range(COUNT):
        adapted = peftops.attach(base, peftops.LoRAConfig(r=RANK))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        peftops.save(adapted, folder / str(i))
        peftops.detach(adapted)


def ours(base, folder, prompts, chosen):
    pool = pool_for(base, adapters=COUNT, rank=RANK)
    for i in range(COUNT):
        add_adapter(pool, str(i), folder / str(i))

    def call():
        with Server(base, pool, max_batch=COUNT, stop=[]) as server:
            for prompt, adapter in zip(prompts, chosen, strict=True):
                server.submit(prompt, adapter=adapter, max_new=NEW)
            return {completion.number - 1: completion.ids for completion in server.run()}

    return call


def peft(base, folder, prompts):
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, folder / "0", adapter_name="0")
    for i in range(1, COUNT):
        adapted.load_adapter(folder / str(i), adapter_name=str(i))
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)

    @torch.no_grad()
    def loop():
        answers = {}
        for i, prompt in enumerate(prompts):
            adapted.set_adapter(str(i))
            ids = torch.tensor([prompt], device=base.device)
            out = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            answers[i] = out[0, len(prompt) :].tolist()
        return answers

    @torch.no_grad()
    def mixed():
        names = [str(i) for i in range(COUNT)]
        out = adapted.generate(input_ids=padded, attention_mask=mask, adapter_names=names, **options)
        return dict(enumerate(out[:, longest:].tolist()))

    return loop, mixed


def cases():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 33, (COUNT,), generator=draw, device="cpu").tolist()
    prompts = [torch.randint(1, 4096, (n,), generator=draw, device="cpu").tolist() for n in lengths]
    names = [str(i) for i in range(COUNT)]
    with tempfile.TemporaryDirectory() as folder:
        folder, base = Path(folder), model()
        adapters(base, folder)
        loop, mixed = peft(copy.deepcopy(base), folder, prompts)
        providers = {
            "peftops": ours(copy.deepcopy(base), folder, prompts, names),
            "one adapter": ours(copy.deepcopy(base), folder, prompts, ["0"] * COUNT),
            "no adapter": ours(copy.deepcopy(base), folder, prompts, [None] * COUNT),
            "PEFT loop": loop,
            "PEFT mixed": mixed,
        }
        assert providers["peftops"]() == loop(), "not the same answers"
        yield harness.Case(
            f"{COUNT} requests, {COUNT} adapters, {COUNT * NEW} tokens",
            providers,
            want={"PEFT loop": 2, "PEFT mixed": 1},
        )


if __name__ == "__main__":
    harness.run("serving", cases())
