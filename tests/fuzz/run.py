"""Damaged files of every kind that peftops reads: each ends in a sentence or loads; nothing else is right.

    python tests/fuzz/run.py --cases 20000              # all kinds in turn, in processes of their own
    python tests/fuzz/run.py --kind gguf --case 17      # one again

A case follows from its kind and number. A process has bounded memory, and a case bounded time, so that numbers out of
a file can neither fill the machine nor stop the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402

import models  # noqa: E402
import peftops  # noqa: E402
from fuzz.damage import STRANGE, damage_bytes, damage_json, damage_safetensors, damage_value  # noqa: E402
from fuzz.seeds import CHECKPOINTS, MAKE, base, calibration_rows, seeds  # noqa: E402

RIGHT = (ValueError, TypeError, OSError, KeyError)  # what the docstrings promise
SECONDS, MEMORY = 60, 6 << 30  # of the processor that a case may take, and bytes of a process
CHUNK = 500  # cases of a process


def adapter(folder: Path, rng: Random) -> None:
    name = rng.choice(sorted(p.name for p in seeds("adapter").iterdir()))
    shutil.copytree(seeds("adapter") / name, folder / "a")
    file = folder / "a" / rng.choice(["adapter_config.json", "peftops.json", "adapter_model.safetensors"])
    damage = damage_safetensors if file.suffix == ".safetensors" else damage_json
    file.write_bytes(damage(file.read_bytes(), rng))
    model = base()
    try:
        peftops.load(model, folder / "a")
    except RIGHT:
        assert not hasattr(model, "_peftops"), "an adapter is left in the model"
        raise


def config(folder: Path, rng: Random) -> None:
    shutil.copytree(seeds("config"), folder / "m")
    (folder / "m" / "config.json").write_bytes(damage_json((folder / "m" / "config.json").read_bytes(), rng))
    peftops.load_model(folder / "m", quantize=rng.random() < 0.5)


def bitsandbytes(folder: Path, rng: Random) -> None:
    shutil.copytree(seeds("bitsandbytes"), folder / "m")
    file = folder / "m" / "model.safetensors"
    if rng.random() < 0.4:
        file.write_bytes(damage_safetensors(file.read_bytes(), rng))
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        parts = [name for name in tensors if ".weight" in name and name.count(".weight.")]
        name = rng.choice(parts if rng.random() < 0.5 else [name for name in parts if "quant_state" in name])
        if "quant_state" in name:
            state = damage_json(bytes(tensors[name].tolist()), rng) or b"{}"
            tensors[name] = torch.tensor(list(state), dtype=torch.uint8)
        else:
            damaged = _damage_state(tensors[name], rng)
            tensors[name] = damaged if isinstance(damaged, torch.Tensor) and not damaged.is_sparse else torch.zeros(0)
        if any(t.is_meta for t in tensors.values()):
            del tensors[name]
        save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    peftops.load_model(folder / "m")


def gguf(folder: Path, rng: Random) -> None:
    (folder / "m.gguf").write_bytes(damage_bytes(seeds("gguf").read_bytes(), rng))
    peftops.load_model(folder / "m.gguf", quantize=rng.random() < 0.5)


def report(folder: Path, rng: Random) -> None:
    from peftops.cli.report import read, table

    (folder / "report.json").write_bytes(damage_json((seeds("report") / "report.json").read_bytes(), rng))
    table([read(folder)])


def checkpoint(folder: Path, rng: Random) -> None:
    """Of a run of two steps: restored and gone on with, as --resume does."""
    from peftops.cli.checkpoint import load_checkpoint

    job, settings = _job(folder)
    job.checkpoint()
    file = folder / "checkpoint.pt"
    if rng.random() < 0.4:
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
    else:
        torch.save(_damage_state(torch.load(file, weights_only=True), rng), file)
    job, settings = _job(folder)
    job.restore(load_checkpoint(file, settings, 4))
    job.one_step([[_example()] * 2])


def _example() -> object:
    from peftops.prompts.example import Example

    return Example.of([5, 6, 7, 8], 2)


def _job(folder: Path) -> tuple[object, dict]:
    from peftops.cli.job import Job

    args = argparse.Namespace(
        optimizer="adamw", weight_decay=0.0, method="lora", steps=4, lr=1e-3, warmup=0, clip=1.0, batch=2, accumulate=1
    )
    model = peftops.attach(base(), peftops.LoRAConfig(r=2, target=["q_proj"]))
    settings = {"lr": 1e-3, "r": 2}
    job = Job(args, model, models.tokenizer(), [_example()], [], folder, settings)
    job.question = [{"role": "user", "content": "a"}]
    job.losses.append(job.one_step([[_example()] * 2]))
    job.step = 1
    return job, settings


def _damage_state(state: object, rng: Random) -> object:
    if isinstance(state, torch.Tensor) and (state.is_sparse or state.is_meta):
        return rng.choice(STRANGE)
    if isinstance(state, torch.Tensor):
        other = rng.choice([torch.float64, torch.int32, torch.float16])
        ways = [
            state.flatten()[: state.numel() // 2],
            state.to(other),
            state[None],
            torch.full_like(state, float("nan")) if state.is_floating_point() else state * 0,
            state.float().to_sparse(),
            state.to("meta"),
            rng.choice(STRANGE),
        ]
        return rng.choice(ways)
    if isinstance(state, dict) and state:
        key = rng.choice(list(state))
        return {**state, key: _damage_state(state[key], rng)} if rng.random() < 0.9 else {**state, "x": 1}
    if isinstance(state, list) and state:
        i = rng.randrange(len(state))
        return [*state[:i], _damage_state(state[i], rng), *state[i + 1 :]] if rng.random() < 0.8 else state[:i]
    return rng.choice(STRANGE)


def gptq(folder: Path, rng: Random) -> None:
    from peftops.integrations.gptq_files import from_gptq, to_gptq, to_gptq_integers

    dense = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight = peftops.group_quantize(dense, bits=4, group_size=32)
    parts = to_gptq(weight) if rng.random() < 0.5 else to_gptq_integers(weight)[0]
    for _ in range(rng.choice([1, 1, 2])):
        parts = _damage_state(parts, rng)
    if isinstance(parts, dict) and rng.random() < 0.1:
        parts.pop(rng.choice([*parts]))
    made = from_gptq(parts, bits=rng.choice([2, 3, 4, 4, 4, 4, 8, 5, 0]))
    peftops.group_dequantize(made)


def awq(folder: Path, rng: Random) -> None:
    from peftops.integrations.awq_files import from_awq

    words = lambda rows: torch.full((rows, 4), 0x12345678, dtype=torch.int32)
    parts = {"qweight": words(64), "qzeros": words(2), "scales": torch.ones(2, 32).half()}
    parts = _damage_state(parts, rng)
    peftops.group_dequantize(from_awq(parts if isinstance(parts, dict) else {"qweight": parts}))


def codes(folder: Path, rng: Random) -> None:
    """A model in codes; one whose configuration is sound, and that is read, computes as well."""
    name = rng.choice(sorted(p.name for p in seeds("codes").iterdir()))
    shutil.copytree(seeds("codes") / name, folder / "m")
    file = folder / "m" / rng.choice(["config.json", "model.safetensors", "model.safetensors"])
    if file.suffix == ".safetensors":
        file.write_bytes(damage_safetensors(file.read_bytes(), rng))
    elif rng.random() < 0.5:
        file.write_bytes(damage_json(file.read_bytes(), rng))
    else:  # the few lines that say how to read the codes
        config = json.loads(file.read_text())
        config["quantization_config"] = damage_value(config["quantization_config"], rng)
        file.write_text(json.dumps(config))
    model = peftops.load_model(folder / "m", quantize=rng.random() < 0.5)
    if file.suffix == ".safetensors":
        model(models.tokens(1, 4, vocabulary=90))


def trainer(folder: Path, rng: Random) -> None:
    """A checkpoint of transformers' Trainer, to go on from: all of it, or nothing changes."""
    from peftops.integrations.checkpoints import load_training

    name = rng.choice(sorted(CHECKPOINTS))
    shutil.copytree(seeds("trainer") / name, folder / "c")
    file = rng.choice(sorted(p for p in (folder / "c").iterdir() if p.suffix in (".json", ".safetensors")))
    damage = damage_safetensors if file.suffix == ".safetensors" else damage_json
    file.write_bytes(damage(file.read_bytes(), rng))
    model = peftops.attach(base(), CHECKPOINTS[name])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    try:
        load_training(model, folder / "c")
    except RIGHT:
        assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in before.items()), "half is read"
        raise


def calibration(folder: Path, rng: Random) -> None:
    """Gone on with after an interruption: its result is all there, or is not there."""
    shutil.copytree(seeds("calibration"), folder / "c")
    file = rng.choice(sorted((folder / "c" / ".out.unfinished").iterdir()))
    damage = damage_safetensors if file.suffix == ".safetensors" else damage_json
    file.write_bytes(damage(file.read_bytes(), rng))
    out = folder / "c" / "out"
    try:
        peftops.quantize_model(folder / "c" / "model", calibration_rows(), out=out)
    except RIGHT:
        assert not out.exists(), "half of a model is left"
        raise
    peftops.load_model(out)


KINDS: dict[str, Callable[[Path, Random], None]] = {
    f.__name__: f
    for f in (adapter, config, bitsandbytes, gguf, report, checkpoint, gptq, awq, codes, trainer, calibration)
}


class TookTooLong(Exception):
    pass


def run_case(kind: str, number: int) -> str | None:
    """What was wrong, or None."""

    def stop(*_: object) -> None:
        raise TookTooLong

    old = signal.signal(signal.SIGPROF, stop)  # by the clock, a busy machine would be a fault
    if kind in MAKE:
        seeds(kind)  # before the clock starts
    with tempfile.TemporaryDirectory() as folder:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            KINDS[kind](Path(folder), Random(f"{kind}-{number}"))
        except RIGHT as error:
            return None if str(error).strip() else f"{type(error).__name__} without a sentence"
        except BaseException as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, old)
    return None


def run_here(kind: str, numbers: range) -> int:
    """Cases in this process, whose memory is bounded; how many went wrong."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    wrong, start = 0, time.process_time()
    for number in numbers:
        sys.stdout.write(f"\r{kind} {number}")  # the last one is what a crash is told by
        sys.stdout.flush()
        problem = run_case(kind, number)
        if problem:
            wrong += 1
            print(f"\r{kind} {number}: {problem}", flush=True)
    seconds = time.process_time() - start
    print(f"\r{kind} {numbers[-1]}, the last of {len(numbers)} in {seconds:.0f} s of the processor", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000, help="in all (default 20000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of a kind")
    parser.add_argument("--kind", nargs="+", choices=[*KINDS], help="--cases of each of these, in this process")
    parser.add_argument("--case", type=int, help="one case of it, with its traceback")
    args = parser.parse_args()
    if args.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            KINDS[args.kind[0]](Path(folder), Random(f"{args.kind[0]}-{args.case}"))
        return 0
    if args.kind:
        warnings.simplefilter("ignore")
        return min(sum(run_here(kind, range(args.first, args.first + args.cases)) for kind in args.kind), 100)
    failed, each = 0, -(-args.cases // len(KINDS))
    for kind in KINDS:
        for first in range(args.first, args.first + each, CHUNK):
            count = min(CHUNK, args.first + each - first)
            command = [sys.executable, __file__, "--kind", kind, "--first", str(first), "--cases", str(count)]
            code = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
            if code:
                how = f"{code} wrong" if 0 < code <= 100 else f"crashed ({code})"
                print(f"\n{kind} from {first}: {how}", flush=True)
                failed += 1
    print(f"\n{each * len(KINDS)} cases, {failed or 'no'} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
