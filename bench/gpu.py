"""Checks and measures peftops on this machine's GPU, correctness first, and leaves a folder of JSON:

    python bench/gpu.py                            # every step, into docs/gpu/NAME-OF-THE-CARD
    python bench/gpu.py --steps tests,products     # some of them
    python bench/gpu.py --report docs/gpu/NAME     # print the tables of what is there

A step whose file is there already is not run again (--again runs it), so a run that was cut off goes on where it
stopped. Each step is a process of its own: one that loses its CUDA context takes nothing else with it.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Seconds that a step may take, in the order of their value.
STEPS = {
    "machine": 60,
    "smoke": 90,
    "tests": 150,
    "sanitizer": 150,
    "products": 150,
    "others": 120,
    "layers": 120,
    "host": 60,
    "block": 60,
    "model": 180,
    "counters": 150,
}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
COUNTERS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "sm__inst_executed.sum": "instructions",
    "sm__inst_executed_pipe_tensor.sum": "tensor_instructions",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "shared_wavefronts",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "shared_conflicts",
    "smsp__average_warps_issue_stalled_imc_miss_per_issue_active.ratio": "constant_stalls",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "memory_stalls",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "barrier_stalls",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
}


def machine() -> dict:
    import torch

    import peftops

    if not torch.cuda.is_available() or not hasattr(peftops, "_C_cuda"):
        raise SystemExit("a GPU, torch with CUDA and peftops built with it are needed: python -m peftops info")
    sys.path.insert(0, str(ROOT / "bench"))
    import harness

    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name,
        "capability": [card.major, card.minor],
        "multiprocessors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
        "memory_bytes": card.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "built": peftops._C.build_info,
        "bf16_flops": harness.matmul_peak(torch.bfloat16, "cuda"),
        "fp32_flops": harness.matmul_peak(torch.float32, "cuda", 4096),
        "copy_bytes_per_second": harness.copy_bandwidth(0, "cuda"),
    }


def smoke() -> dict:
    """Every operator once, beside the CPU."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from operator_samples import on_gpu, operators, samples, tensors_of, written

    results = {}
    for name, call in sorted(operators().items()):
        torch.manual_seed(0)
        arguments = samples()[name]
        moved = on_gpu(call, arguments)

        def run(values, call=call):
            result = call(*values)
            return tensors_of([result, *(values[i] for i in written(call))])

        got, want = run(moved), run(arguments)
        torch.cuda.synchronize()
        pairs = [(g.cpu().double(), w.double()) for g, w in zip(got, want, strict=True)]
        worst = max(float((g - w).abs().max() / w.abs().max().clamp(min=1e-30)) for g, w in pairs)
        results[name] = {"equal": all(map(torch.equal, *zip(*pairs, strict=True))), "worst_relative": worst}
        print(f"{name:24} {worst:.2e}", flush=True)
    wrong = [name for name, result in results.items() if not result["worst_relative"] < 1e-5]
    return {"operators": results, "wrong": wrong}


def command(*words: object, seconds: int = 600) -> tuple[int, str]:
    """Its exit status and what it printed; a command that takes too long is ended, and what it printed is kept."""
    with subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT) as run:
        try:
            text = run.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            run.kill()
            text = run.communicate()[0] + b"\n(ended: it took too long)"
    return run.returncode, text.decode(errors="replace")


def tests() -> dict:
    parallel = ["-n", "8"] if command(sys.executable, "-c", "import xdist")[0] == 0 else []
    status, text = command(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "tests/ops",
        "tests/gpu",
        "tests/nn",
        "tests/serving",
        "tests/test_bench.py",
        "-x" if not parallel else "--maxfail=80",
        *parallel,
        "--tb=short",
        "-p",
        "no:cacheprovider",
        seconds=STEPS["tests"] - 10,
    )
    lines = text.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join([*lines[-400:], *failed[:40], *lines[-1:]] if failed else lines[-1:]))
    return {"status": status, "last_line": lines[-1] if lines else "", "failed": failed}


def sanitizer() -> dict:
    """The smoke test under each of compute-sanitizer's tools, at once."""
    if not shutil.which("compute-sanitizer"):
        return {"skipped": "compute-sanitizer is not on the PATH"}
    runs = {}
    for tool in TOOLS:
        words = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool != "initcheck":  # which has to see all that writes
            words += ["--kernel-name", "kernel_substring=peftops"]
        words += [sys.executable, __file__, "--step", "smoke"]
        runs[tool] = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    result, end = {}, time.monotonic() + STEPS["sanitizer"] - 10
    for tool, run in runs.items():
        try:
            text = run.communicate(timeout=max(1, end - time.monotonic()))[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            run.kill()
            text = run.communicate()[0].decode(errors="replace") + "\n(ended: it took too long)"
        found = [line for line in text.splitlines() if line.startswith("=========")]
        result[tool] = {"status": run.returncode, "summary": found[-1:]}
        print(*(found[:300] if run.returncode else []), f"{tool} {run.returncode} {found[-1:]}", sep="\n")
    return result


def counters() -> dict:
    """What a profiler counts of one launch of each main kernel."""
    if not shutil.which("ncu"):
        return {"skipped": "ncu is not on the PATH"}
    ncu = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--kernel-name-base", "demangled"]
    ncu += ["--kernel-name", "regex:peftops", "--metrics", ",".join(COUNTERS)]
    launches = sys.executable, __file__, "--step", "launches"
    status, text = command(*ncu, *launches, seconds=STEPS["counters"] - 10)
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return {"status": status, "log": text[-20_000:]}
    head, units, *rows = rows
    records = []
    for row in rows:
        of, unit = dict(zip(head, row, strict=True)), dict(zip(head, units, strict=True))
        values = {short: f"{of[long]} {unit[long]}" for long, short in COUNTERS.items() if long in of}
        records.append({"kernel": of["Kernel Name"][:160], "grid": of.get("Grid Size"), **values})
        print(re.sub(r"peftops::cuda::|\(anonymous namespace\)::|<unnamed>::", "", records[-1]["kernel"])[:60], values)
    return {"status": status, "records": records}


def run_step(name: str) -> dict:
    if name in globals() and name in ("machine", "smoke", "tests", "sanitizer", "counters"):
        return globals()[name]()
    sys.path.insert(0, str(ROOT / "bench"))
    import gpu_layers
    import gpu_model
    import gpu_steps

    return {
        "products": gpu_steps.products,
        "others": gpu_steps.others,
        "layers": gpu_layers.layers,
        "host": gpu_steps.host,
        "block": lambda: gpu_model.qlora_step(1),
        "model": gpu_model.qlora_step,
        "launches": gpu_steps.launches,
    }[name]()


def report(folder: Path) -> str:
    """Tables of what is there, in Markdown."""
    load = lambda step: json.loads(path.read_text()) if (path := folder / f"{step}.json").exists() else {}
    card, lines = load("machine"), []
    if card:
        lines += [
            f"{card['card']}, torch {card['torch']}, {card['bf16_flops'] / 1e12:.0f} TFLOP/s bf16, "
            f"{card['copy_bytes_per_second'] / 1e9:.0f} GB/s copy",
            "",
        ]
    if test := load("tests"):
        lines += [f"tests: {test['last_line']}", ""]
    if checks := load("sanitizer"):
        lines += [f"{tool}: {' '.join(found.get('summary', []))}" for tool, found in checks.items() if tool in TOOLS]
        lines += [""]
    if products := load("products").get("records"):
        names = list(dict.fromkeys(name for record in products for name in record["us"]))
        lines += ["| | W | M | " + " | ".join(names) + " | best other / peftops |"]
        lines += ["|---|---|---|" + "---|" * (len(names) + 1)]
        for r in products:
            us, own = r["us"], ("peftops", "kernels", "wgmma", "library", "dense")
            other = min([t for name, t in us.items() if name not in own and t == t], default=float("nan"))
            cells = " | ".join(f"{us[name]:.1f}" if name in us else "" for name in names)
            lines += [f"| {r['direction']} | {r['n']}x{r['k']} | {r['m']} | {cells} | {other / us['peftops']:.2f} |"]
        lines += [""]
    for step in ("others", "layers", "block", "model"):
        for r in load(step).get("records", []):
            if "us" in r:
                rate = f"; {r['bytes'] / min(r['us'].values()) / 1e3:.0f} GB/s at best" if "bytes" in r else ""
                lines += [f"{r['label']}: " + ", ".join(f"{name} {us:.1f} us" for name, us in r["us"].items()) + rate]
            elif "error" in r:
                lines += [f"{r['provider']}, {r['layers']} layers: {r['error']}"]
            else:
                how, rate = ", checkpointing" if r["checkpointing"] else "", f"{r['tokens_per_second']:.0f} tokens/s"
                lines += [
                    f"QLoRA step, {r['layers']} layers{how}, {r['provider']}: {rate}, "
                    f"peak {r['peak_bytes'] / 2**30:.2f} GiB, loss {r['loss']:.3f}"
                ]
    if us := load("host"):
        lines += ["", *(f"host, {name}: {value:.1f} us" for name, value in us.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS), help="which, with commas between")
    parser.add_argument("--out", type=Path, help="folder for the JSON files (docs/gpu/NAME-OF-THE-CARD)")
    parser.add_argument("--again", action="store_true", help="run steps whose file is there")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="print the tables of a folder, and run nothing")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # in this process; its result is the last line
    args = parser.parse_args()
    if args.report:
        print(report(args.report))
        return
    if args.step:
        print(json.dumps(run_step(args.step)))
        return
    steps = args.steps.split(",")
    for step in steps:
        if step not in STEPS:
            parser.error(f"--steps: {step!r} is none of {', '.join(STEPS)}")
    if not args.out:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU on this machine")
        args.out = ROOT / "docs" / "gpu" / torch.cuda.get_device_name().replace(" ", "-").lower()
    args.out.mkdir(parents=True, exist_ok=True)
    for step in steps:
        path = args.out / f"{step}.json"
        if path.exists() and not args.again:
            continue
        begin = time.monotonic()
        status, text = command(sys.executable, __file__, "--step", step, seconds=STEPS[step])
        print(f"== {step}: {time.monotonic() - begin:.0f} s, status {status}", flush=True)
        *rest, last = text.rstrip().splitlines() or [""]
        try:
            result = json.loads(last)
        except json.JSONDecodeError:  # what was found up to there is in the text
            result = {"status": status, "unfinished": text[-100_000:]}
            path = path.with_suffix(".unfinished.json")
            print("\n".join([*rest[-15:], last]))
        else:
            print("\n".join(rest[-450:] if step in ("tests", "sanitizer", "smoke") else []), flush=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.rename(path)
    print(report(args.out))


if __name__ == "__main__":
    main()
