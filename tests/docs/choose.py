"""Writes docs/choose.md from the planner's tables: ``python tests/docs/choose.py``."""

from __future__ import annotations

from pathlib import Path

from peftops.attaching import METHODS
from peftops.planner import TABLE, WANTS
from peftops.planner.choose import MANY, TASKS, Want

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "choose.md"

HEAD = """# Which method to choose

`peftops plan --model MODEL --memory 16GiB --want WANT` applies these rules to a model and to the memory that you have.
It takes the first method of a row that fits. `python tests/docs/choose.py` writes this page from the rules
(`peftops/planner/choose.py`).

## Start here

* **You do not know**: `lora`. If its dense base does not fit in memory: `qlora`.
* **You deploy in 4 bits**: `qalora`. It alone merges into the codes without error.
* **You have many tasks**: one adapter each on one base; `peftops.Server` serves them in one batch.

## By what matters most

| `--want` | methods, best first | reason |
|---|---|---|
"""

TRAITS = """
## The methods compared

The rows without a mark follow a published comparison. Those marked * follow from the formulas and from HF PEFT's
published runs. [Benchmarks](benchmarks.md#every-method) has one measured run of each.

| `--method` | config | overhead of computing | memory efficiency | versatility across tasks | effect on quality |
|---|---|---|---|---|---|
"""

FILES = """
## Merging and files {#files}

*merges*: whether `peftops.merge` can fold the adapter into the weights. *file*: whether HF PEFT reads the adapter.

"""


def rule(name: str, want: Want) -> str:
    return f"| {name} | {', '.join(f'`{method}`' for method in want.methods)} | {want.why} |"


def methods_table() -> str:
    """The README's, where each method has its line."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.split("## Methods")[1].split("\n\n")[1]


def page() -> str:
    config = {adapter.__name__.lower(): kind.__name__ for kind, adapter in METHODS.items()}
    wants = [rule(f"`{name}`", want) for name, want in WANTS.items()]
    wants.append(rule(f"`quality` with `--tasks` 2 to {MANY - 1}", TASKS))
    wants.append(rule(f"`quality` with `--tasks` {MANY} and more", WANTS["small"]))
    entry = lambda config: f"[`{config}`](reference/methods.md#peftops.{config})"
    traits = [
        f"| `{name}`{' *' if row.ours else ''} | {entry(config[name])} | {row.overhead} | {row.memory} | "
        f"{row.versatility} | {row.quality} |"
        for name, row in TABLE.items()
    ]
    return HEAD + "\n".join(wants) + "\n" + TRAITS + "\n".join(traits) + "\n" + FILES + methods_table() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
