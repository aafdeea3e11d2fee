"""The table of docs/frameworks.md, made of the tests that prove it; run as a program, this prints it."""

from __future__ import annotations

import ast
from pathlib import Path

COLUMNS = {
    "load": "load",
    "train": "train",
    "checkpoint": "checkpoint",
    "resume": "resume",
    "save": "save",
    "several": "several processes",
}
LIBRARIES = (  # in the order of the table
    "transformers.from_pretrained",
    "bitsandbytes",
    "AutoAWQ",
    "HF PEFT on our layers",
    "llama.cpp",
    "transformers.Trainer",
    "accelerate",
    "TRL: SFTTrainer, DPOTrainer",
    "Lightning",
    "torch FSDP2",
    "DeepSpeed: ZeRO-1, ZeRO-2",
)


def proves(library, **cells):
    """A test's cells in the row of a library; those of several tests are put together."""
    assert library in LIBRARIES and cells.keys() <= COLUMNS.keys(), (library, cells)
    return lambda test: test


def table() -> str:
    """Read out of the tests' sources: a claim is there if a test has it, and not else."""
    cells: dict[str, dict[str, list[str]]] = {library: {} for library in LIBRARIES}
    tests: dict[str, list[str]] = {library: [] for library in LIBRARIES}
    for path in sorted(Path(__file__).parent.glob("int*/test_*.py")):
        for test in ast.walk(ast.parse(path.read_text())):
            for call in getattr(test, "decorator_list", ()):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "proves":
                    library, own = call.args[0].value, {word.arg: word.value.value for word in call.keywords}
                    for column, text in own.items():
                        cells[library].setdefault(column, []).append(text)
                    tests[library].append(f"`{test.name}`")
    rows = [f"| library | {' | '.join(COLUMNS.values())} | test |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for library in LIBRARIES:
        own = " | ".join(", ".join(dict.fromkeys(cells[library].get(column, ()))) for column in COLUMNS)
        rows.append(f"| {library} | {own} | {', '.join(dict.fromkeys(tests[library]))} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
