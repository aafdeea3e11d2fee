"""Whether the tests notice faults of the Python and the CPU code: mutants of single lines, and the tests beside them.

    python tests/mutate.py --mutants 5                  # of each Python file below
    python tests/mutate.py --only serving --mutants 50
    python tests/mutate.py --only csrc --mutants 3      # of kernels: each is built, which takes a minute or more

A mutant changes an operator, a comparison, a number or a name like min, or drops a statement. It is written to a copy
of the repository, and the tests that belong to its file run there. It is caught if they fail or do not end; survivors
are printed, and are a missing test or the same program in other words. (For CUDA kernels see tests/sim/mutate.py.)
"""

from __future__ import annotations

import argparse
import ast
import collections
import io
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {  # by file, or by directory: what should notice
    "peftops/serving": ["serving"],
    "peftops/influence": ["influence"],
    "peftops/planner": ["planner/test_planner.py"],
    "peftops/integrations/together.py": ["integrations/test_together.py"],
    "peftops/integrations/files.py": ["integrations/test_together.py", "integrations/test_peft_files.py"],
    "peftops/integrations/peft_files.py": [
        "integrations/test_peft_files.py",
        "integrations/test_hostile_options.py",
        "methods/test_all_or_nothing.py",
    ],
    "peftops/integrations/hf.py": ["integrations/test_hf.py"],
    "peftops/attaching/attachment.py": ["methods/test_conformance.py", "methods/test_all_or_nothing.py"],
    "peftops/attaching/merging.py": ["methods/test_conformance.py", "methods/test_all_or_nothing.py"],
    "peftops/attaching/patterns.py": ["methods/test_patterns.py"],
    "peftops/attaching/targets.py": ["methods/test_lora.py", "methods/test_methods.py", "methods/test_counts.py"],
    "peftops/attaching/config.py": ["methods/test_patterns.py", "methods/test_methods.py", "methods/test_lora.py"],
    "peftops/methods/lora.py": ["methods/test_lora.py", "methods/test_conformance.py"],
    "peftops/methods/relora.py": ["methods/test_relora.py"],
    "peftops/prompts/few_shot.py": ["methods/test_hard_prompt.py"],
    "peftops/nn/adapter.py": ["methods/test_conformance.py", "methods/test_all_or_nothing.py"],
    "peftops/optim/adamw8bit.py": ["nn/test_adamw8bit_optimizer.py"],
    "peftops/serving/adapter_pool.py": ["serving/test_adapter_pool.py", "serving/test_adapter_pool_threads.py"],
    "peftops/nn/layers.py": ["methods/test_lora.py", "nn/test_group_layers.py"],
    "peftops/nn/quantized.py": ["ops/test_packed_tensor.py", "nn/test_group_layers.py"],
    "peftops/nn/packed_linear.py": ["ops/test_packed_tensor.py", "nn/test_group_layers.py"],
    "peftops/nn/undo.py": ["methods/test_all_or_nothing.py"],
    "peftops/integrations/mxfp4_files.py": ["integrations/test_mxfp4_files.py"],
    "peftops/ops/format.py": ["ops/test_packed_tensor.py"],
    "peftops/ops/no_memory.py": ["ops/test_packed_tensor.py"],
    "peftops/ops/packed_tensor.py": ["ops/test_packed_tensor.py", "ops/test_nf4_tensor.py", "ops/test_group_tensor.py"],
    "peftops/ops/row_shards.py": ["ops/test_packed_tensor.py", "integrations/test_distributed.py"],
    "csrc/kernels/cpu/nf4_quantize.cpp": ["ops/test_nf4_quantize.py"],
    "csrc/kernels/cpu/nf4_dequantize.cpp": ["ops/test_nf4_dequantize.py"],
    "csrc/kernels/cpu/group_quantize.cpp": ["ops/test_group_quantize.py"],
    "csrc/kernels/cpu/mxfp4_quantize.cpp": ["ops/test_mxfp4_quantize.py"],
    "csrc/kernels/cpu/qalora_merge.cpp": ["ops/test_qalora_merge.py"],
}
SWAPS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "//": "*",
    "%": "+",
    "&": "|",
    "|": "&",
    "<<": ">>",
    ">>": "<<",
    "+=": "-=",
    "-=": "+=",
    "&&": "||",
    "||": "&&",
    "and": "or",
    "or": "and",
    "not": "",
    "is": "is not",
    "in": "not in",
    "True": "False",
    "False": "True",
    "true": "false",
    "false": "true",
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "continue": "break",
    "break": "continue",
}
CPP = re.compile(
    r"//.*|\"[^\"\n]*\"|(?P<token>&&|\|\||[<>=!+\-]=|<<|>>|(?<= )[-+*/%<>&|](?= )|\b(?:min|max|true|false|"
    r"break|continue)\b|(?<![\w.])\d+(?![\w.]))"
)

Change = tuple[int, int, str]  # of a text: where it begins, where it ends, what is there then


def mutants(path: Path, count: int, rng: random.Random) -> Iterator[Change]:
    """As many changes of a file, which make other programs of it."""
    text, found = path.read_text(), changes(path)
    rng.shuffle(found)
    whole = ast.dump(ast.parse(text)) if path.suffix == ".py" else ""
    for start, end, new in found:
        if count == 0:
            return
        try:
            if whole and ast.dump(ast.parse(text[:start] + new + text[end:])) == whole:
                continue
        except SyntaxError:
            continue
        count -= 1
        yield start, end, new


def changes(path: Path) -> list[Change]:
    """All that may be changed in a file; some changes leave no program."""
    text = path.read_text()
    found = python_tokens(text) if path.suffix == ".py" else cpp_tokens(text)
    return [(a, b, new) for a, b in found for new in replacements(text[a:b])] + (
        dropped_statements(text) if path.suffix == ".py" else []
    )


def replacements(token: str) -> list[str]:
    if token.isdigit():
        return [str(int(token) + 1), *([str(int(token) - 1)] if int(token) else [])]
    return [SWAPS[token]] if token in SWAPS else []


def line_starts(text: str) -> list[int]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def python_tokens(text: str) -> Iterator[tuple[int, int]]:
    """Where operators, names and numbers are; not in texts, nor in annotations of arguments and results."""
    at = line_starts(text)
    annotated = [
        node
        for node in ast.walk(ast.parse(text))
        for node in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if node is not None
    ]
    within = {
        (n.lineno, column)
        for n in annotated
        for column in range(n.col_offset, n.end_col_offset + 1)
        if n.lineno == n.end_lineno
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER) and token.start not in within:
            if not token.line.lstrip().startswith(("import ", "from ", "@")):
                yield at[token.start[0] - 1] + token.start[1], at[token.end[0] - 1] + token.end[1]


def dropped_statements(text: str) -> list[Change]:
    at = line_starts(text)
    kinds = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete)
    plain = [
        n
        for n in ast.walk(ast.parse(text))
        if isinstance(n, kinds)
        and n.col_offset
        and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant | ast.Yield))
    ]
    return [(at[n.lineno - 1] + n.col_offset, at[n.end_lineno - 1] + n.end_col_offset, "pass") for n in plain]


def cpp_tokens(text: str) -> Iterator[tuple[int, int]]:
    at = line_starts(text)
    for start, line in zip(at, text.splitlines(), strict=False):
        if not line.lstrip().startswith(("#", "*", "/*", "template")):
            for match in CPP.finditer(line):
                if match["token"]:
                    yield start + match.start(), start + match.end()


def copy_of(root: Path, to: Path) -> None:
    """What the tests need, with what is built."""
    for name in subprocess.check_output(["git", "ls-files"], cwd=root, text=True).split("\n"):
        if name and (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    for built in (root / "peftops").glob("*.so"):
        shutil.copy2(built, to / "peftops")


def judge(copy: Path, file: str, tests: list[str], seconds: float) -> str:
    """What becomes of the copy as it is now."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    # By the processor's time: by the clock, a busy machine would catch every mutant. What sleeps ends by the clock.
    limit = partial(resource.setrlimit, resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    run = lambda *command, **how: subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, **how
    )
    try:
        if not file.endswith(".py") and run("setup.py", "--quiet", "build_ext", "--inplace").returncode:
            return "does not build"
        tests = [f"tests/{name}" for name in tests]
        done = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, preexec_fn=limit, timeout=20 * seconds)
    except subprocess.TimeoutExpired:
        return "does not end"
    return "SURVIVED" if done.returncode == 0 else "caught"


def files_of(only: str) -> list[tuple[str, list[str]]]:
    found = []
    for place, tests in TESTS.items():
        paths = [ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).glob("*.py"))
        found += [(str(path.relative_to(ROOT)), tests) for path in paths]
    chosen = [(file, tests) for file, tests in found if only in file]
    return chosen if only else [(file, tests) for file, tests in chosen if file.endswith(".py")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose path has this; by default all of Python")
    parser.add_argument("--mutants", type=int, default=5, help="of each file (default 5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900, help="of the processor, that its tests may take")
    args = parser.parse_args()
    verdicts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_of(ROOT, copy)
        for file, tests in files_of(args.only):
            text, rng = (ROOT / file).read_text(), random.Random(f"{args.seed} {file}")
            for start, end, new in mutants(ROOT / file, args.mutants, rng):
                (copy / file).write_text(text[:start] + new + text[end:])
                verdict = judge(copy, file, tests, args.seconds)
                verdicts[verdict] += 1
                if verdict == "SURVIVED":
                    line = text.count("\n", 0, start)
                    where = text.splitlines()[line].strip()
                    print(f"{file}:{line + 1}: {text[start:end]!r} -> {new!r}: {where}", flush=True)
            (copy / file).write_text(text)
    print(f"{sum(verdicts.values()) - verdicts['SURVIVED']} of {sum(verdicts.values())} caught: {dict(verdicts)}")


if __name__ == "__main__":
    main()
