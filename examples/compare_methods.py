"""Every method on the demo's model and data with one budget: held-out loss, parameters, memory, time.

    python examples/compare_methods.py --out comparison                  # all, about two minutes each on two cores
    python examples/compare_methods.py --out comparison lora qlora vera  # some

Each method is one run of ``peftops finetune`` in a process of its own, so that peak memory is that of the method.
Learning rates differ, as they must: a prompt moves by hundredths, a weight by thousandths. They are rules of thumb;
nothing was tuned. Prints the table (also to OUT/table.md) and draws OUT/comparison.png.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from finetune_smollm2 import DATA, smollm2

# Method, and what differs from the defaults of `peftops finetune`. Two are not among them: the model has no biases for
# BitFit, and nine heads, which LongLoRA cannot halve.
METHODS = {
    "lora": "--lr 1e-3",
    "qlora": "--lr 1e-3",
    "qalora": "--lr 1e-3",
    "dora": "--lr 1e-3",
    "pissa": "--lr 3e-4",
    "olora": "--lr 3e-4",
    "loftq": "--lr 1e-3",
    "lqlora": "--lr 1e-3",
    "lorafa": "--lr 3e-3",
    "relora": "--lr 1e-3 --every 10",
    "multilora": "--lr 1e-3",
    "tiedlora": "--lr 3e-3",
    "vera": "--lr 1e-2",
    "glora": "--lr 1e-3",
    "ia3": "--lr 1e-2",
    "bottleneck": "--lr 1e-3",
    "llamaadapter": "--lr 1e-2",
    "prompttuning": "--lr 1e-2",
    "prefixtuning": "--lr 1e-2",
    "normtuning": "--lr 3e-3",
    "toplayers": "--lr 3e-4 --set layers=4",
    "headonly": "--lr 3e-4",
    "surgical": "--lr 3e-4",
}


def finetune(method: str, out: Path, steps: int, rows: Path) -> dict:
    done = out / "report.json"
    if not done.is_file():  # a comparison that was interrupted goes on where it was
        options = f"--method {method} --steps {steps} --batch 8 --warmup 4 --seed 0 --overwrite {METHODS[method]}"
        files = ["--model", smollm2(), "--train", DATA / "wordnet_nouns_train.jsonl", "--eval", rows, "--out", out]
        subprocess.run([sys.executable, "-m", "peftops", "finetune", *options.split(), *map(str, files)], check=True)
    return json.loads(done.read_text())


def table(reports: list[dict]) -> str:
    head = ["method", "trained parameters", "held-out loss, before", "after", "peak memory", "training time"]
    rows = [
        [
            r["method"],
            f"{r['trainable']:,}",
            f"{r['loss_before']:.2f}",
            f"{r['loss_after']:.2f}",
            f"{r['peak_bytes'] / 2**20:,.0f} MiB",
            f"{r['seconds']:.0f} s",
        ]
        for r in sorted(reports, key=lambda r: r["loss_after"])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def draw(reports: list[dict], path: Path) -> None:
    """Held-out loss over trained parameters; the nearer to the lower left, the more a parameter does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=120, layout="constrained")
    names: list[tuple[float, float]] = []  # where they are; the next one goes above those that it would cover
    for r in sorted(reports, key=lambda r: r["loss_after"]):
        x, y = r["trainable"], r["loss_after"]
        axes.scatter(x, y, s=r["peak_bytes"] / 2**24, color="#1f4e8c", alpha=0.6)
        height = y
        while any(abs(math.log10(x / other)) < 0.2 and abs(height - taken) < 0.033 for other, taken in names):
            height += 0.005
        names.append((x, height))
        axes.annotate(r["method"], (x, height), xytext=(7, 0), textcoords="offset points", size=8, va="center")
    axes.axhline(reports[0]["loss_before"], color="#c8501e", linewidth=1, label="before training (first method)")
    axes.set(
        xscale="log",
        xlabel="trained parameters",
        ylabel="held-out loss (nats per target token)",
        title="SmolLM2-135M on WordNet's nouns; areas are peak memory",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=100, help="rows to evaluate on (default 100)")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.out / "held_out.jsonl"
    lines = (DATA / "wordnet_nouns_eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[: args.held_out]), encoding="utf-8")
    reports = [finetune(method, args.out / method, args.steps, rows) for method in args.methods or METHODS]
    text = table(reports)
    (args.out / "table.md").write_text(text + "\n")
    draw(reports, args.out / "comparison.png")
    print(f"\n{args.steps} steps of 8 rows, {args.held_out} held-out rows\n\n{text}\n")
    print(f"{args.out}/comparison.png draws it")
    worse = [r["method"] for r in reports if r["loss_after"] >= r["loss_before"]]
    if worse:
        sys.exit(f"worse than the untouched model: {', '.join(worse)}")


if __name__ == "__main__":
    main()
