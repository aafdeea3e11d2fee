"""Whether the tests notice faults of the Python and the CPU code: mutants of single lines, and the tests beside them.

    python tests/mutate.py --mutants 5                  # of each Python file below
    python tests/mutate.py --only serving --mutants 50
    python tests/mutate.py --only csrc --mutants 3      # of kernels: each is built, which takes a minute or more
    python tests/mutate.py --total 75 --seed 7          # in all, one of a file before a second of any

A mutant changes an operator, a comparison, a number or a name like min, or drops a statement. It is written to a copy
of the repository, and the tests that belong to its file run there, but for those in a simulator. It is caught if they
fail or do not end; survivors are a missing test or the same program in other words. (For CUDA kernels see
tests/sim/mutate.py.)
"""

from __future__ import annotations

import argparse
import ast
import collections
import io
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
# The tests that should notice, by file, or by directory for those of its files that have neither a line nor a test of
# their own name. A kernel needs no line: its tests have the name of its op.
TESTS = {
    "peftops/attaching": ["methods/test_methods.py", "methods/test_all_or_nothing.py", "methods/test_uncalled.py"],
    "peftops/attaching/attachment.py": ["methods/test_conformance.py", "methods/test_all_or_nothing.py"],
    "peftops/attaching/biases.py": ["interop/test_peft_options.py"],
    "peftops/attaching/config.py": ["methods/test_patterns.py", "methods/test_options.py", "methods/test_lora.py"],
    "peftops/attaching/left_dense.py": ["methods/test_experts.py", "integrations/test_experts_files.py"],
    "peftops/attaching/merging.py": ["methods/test_conformance.py", "methods/test_all_or_nothing.py"],
    "peftops/attaching/patterns.py": ["methods/test_patterns.py"],
    "peftops/attaching/targets.py": ["methods/test_lora.py", "methods/test_methods.py", "methods/test_counts.py"],
    "peftops/cli": ["cli/test_finetune.py", "cli/test_mistakes.py"],
    "peftops/cli/data.py": ["cli/test_data.py"],
    "peftops/cli/export.py": ["cli/test_deploy.py"],
    "peftops/cli/influence.py": ["cli/test_influence_command.py"],
    "peftops/cli/plan.py": ["cli/test_plan_command.py"],
    "peftops/cli/quantize.py": ["cli/test_quantize_command.py"],
    "peftops/cli/serve.py": ["cli/test_serve_command.py"],
    "peftops/cli/serve_http.py": ["serving/test_http.py", "serving/test_http_refusals.py"],
    "peftops/factors": ["methods/test_loftq.py", "methods/test_methods.py"],
    "peftops/factors/calibrated.py": ["methods/test_calibrated_factors.py"],
    "peftops/factors/lq.py": ["methods/test_lqlora.py"],
    "peftops/factors/lq_budget.py": ["methods/test_lqlora.py"],
    "peftops/influence": ["influence"],
    "peftops/integrations": ["integrations/test_hf.py", "integrations/test_quantizer.py"],
    "peftops/integrations/bitsandbytes_files.py": ["interop/test_bitsandbytes.py", "integrations/test_hf.py"],
    "peftops/integrations/bitsandbytes_models.py": ["interop/test_live_models.py"],
    "peftops/integrations/calibrated_files.py": ["integrations/test_calibration.py"],
    "peftops/integrations/calibration.py": ["integrations/test_calibration.py"],
    "peftops/integrations/checkpoints.py": ["integrations/test_checkpoints.py"],
    "peftops/integrations/expert_codes.py": ["integrations/test_experts_files.py", "integrations/test_mxfp4_files.py"],
    "peftops/integrations/files.py": [
        "integrations/test_files.py",
        "integrations/test_together.py",
        "integrations/test_peft_files.py",
    ],
    "peftops/integrations/gguf_adapter.py": ["integrations/test_gguf_adapter.py"],
    "peftops/integrations/gguf_files.py": ["integrations/test_hf.py"],
    "peftops/integrations/gguf_tokenizer.py": ["integrations/test_gguf_model.py"],
    "peftops/integrations/gptq_files.py": ["integrations/test_gptq_files.py"],
    "peftops/integrations/hf.py": ["integrations/test_hf.py"],
    "peftops/integrations/model_files.py": ["integrations/test_calibration.py"],
    "peftops/integrations/mxfp4_files.py": ["integrations/test_mxfp4_files.py"],
    "peftops/integrations/peft_experts.py": ["integrations/test_experts_files.py"],
    "peftops/integrations/peft_files.py": [
        "integrations/test_peft_files.py",
        "integrations/test_hostile_options.py",
        "methods/test_all_or_nothing.py",
    ],
    "peftops/integrations/peft_layers.py": ["interop/test_live_models.py"],
    "peftops/integrations/peft_tensors.py": ["integrations/test_peft_tensors.py", "integrations/test_peft_files.py"],
    "peftops/integrations/peft_whole.py": ["methods/test_modules_to_save.py", "interop/test_peft_options.py"],
    "peftops/integrations/summary.py": ["methods/test_counts.py", "methods/test_lora.py", "methods/test_experts.py"],
    "peftops/integrations/together.py": ["integrations/test_together.py"],
    "peftops/methods": ["methods/test_methods.py", "methods/test_conformance.py", "methods/test_options.py"],
    "peftops/methods/dora.py": ["methods/test_dora.py", "methods/test_conformance.py"],
    "peftops/methods/llama_adapter.py": ["methods/test_llama_adapter.py"],
    "peftops/methods/glora.py": ["methods/test_lora.py", "methods/test_conformance.py"],
    "peftops/methods/loftq.py": ["methods/test_loftq.py", "methods/test_conformance.py"],
    "peftops/methods/longlora.py": ["methods/test_longlora.py"],
    "peftops/methods/lora.py": ["methods/test_lora.py", "methods/test_conformance.py"],
    "peftops/methods/lqlora.py": ["methods/test_lqlora.py"],
    "peftops/methods/qalora.py": ["methods/test_qalora.py", "methods/test_conformance.py"],
    "peftops/methods/olora.py": ["methods/test_options.py", "methods/test_conformance.py"],
    "peftops/methods/prompt_tuning.py": ["methods/test_prompt_start.py", "methods/test_options.py"],
    "peftops/methods/relora.py": ["methods/test_relora.py"],
    "peftops/methods/surgical.py": ["methods/test_surgical.py"],
    "peftops/methods/tiedlora.py": ["methods/test_lora.py", "methods/test_conformance.py"],
    "peftops/nn": ["methods/test_lora.py", "nn/test_group_layers.py"],
    "peftops/nn/adapter.py": [
        "methods/test_conformance.py",
        "methods/test_all_or_nothing.py",
        "integrations/test_peft_tensors.py",
    ],
    "peftops/nn/layers.py": ["methods/test_lora.py", "nn/test_group_layers.py", "interop/test_peft_layers.py"],
    "peftops/nn/experts.py": ["methods/test_experts.py"],
    "peftops/nn/experts_linear.py": ["methods/test_experts.py", "ops/test_experts_linear.py"],
    "peftops/nn/gated_prompt.py": ["nn/test_gated_prompt.py"],
    "peftops/nn/language_loss.py": ["nn/test_language_loss.py"],
    "peftops/nn/low_rank.py": ["methods/test_experts.py", "methods/test_lora.py", "interop/test_peft_layers.py"],
    "peftops/nn/packed_linear.py": ["ops/test_packed_tensor.py", "nn/test_group_layers.py", "methods/test_lora.py"],
    "peftops/nn/paged_memory.py": ["nn/test_paged_memory.py"],
    "peftops/nn/prompt.py": ["methods/test_prompt_batch.py", "methods/test_methods.py", "methods/test_packed_rows.py"],
    "peftops/nn/quantized.py": ["ops/test_packed_tensor.py", "nn/test_group_layers.py"],
    "peftops/nn/rope.py": ["methods/test_longlora.py", "methods/test_methods.py"],
    "peftops/nn/scale_bias.py": ["methods/test_llama_adapter.py"],
    "peftops/nn/select.py": ["methods/test_surgical.py", "methods/test_modules_to_save.py"],
    "peftops/nn/shifted_attention.py": ["methods/test_longlora.py"],
    "peftops/nn/stored_base.py": ["methods/test_lqlora.py", "methods/test_relora.py"],
    "peftops/nn/tensor_parallel.py": ["nn/test_tensor_parallel.py"],
    "peftops/nn/ties.py": ["integrations/test_ties.py"],
    "peftops/nn/uncalled.py": ["methods/test_uncalled.py"],
    "peftops/nn/undo.py": ["methods/test_all_or_nothing.py"],
    "peftops/nn/unreached.py": ["methods/test_uncalled.py"],
    "peftops/ops": ["ops/test_packed_tensor.py"],
    "peftops/ops/adamw8bit.py": ["ops/test_adamw8bit.py"],
    "peftops/ops/experts_format.py": ["ops/test_experts_linear.py", "ops/test_packed_stack.py"],
    "peftops/ops/experts_linear.py": ["ops/test_experts_linear.py"],
    "peftops/ops/gated_prompt_attention.py": ["ops/test_gated_prompt_attention.py"],
    "peftops/ops/gptq_nf4.py": ["ops/test_gptq_nf4.py"],
    "peftops/ops/gptq_quantize.py": ["ops/test_gptq_quantize.py"],
    "peftops/ops/group_dequantize.py": ["ops/test_group_dequantize.py", "ops/test_packed_stack.py"],
    "peftops/ops/group_linear.py": ["ops/test_group_linear.py"],
    "peftops/ops/group_quantize.py": ["ops/test_group_quantize.py"],
    "peftops/ops/group_tensor.py": ["ops/test_group_tensor.py", "ops/test_packed_stack.py"],
    "peftops/ops/lora_linear.py": ["ops/test_lora_linear.py"],
    "peftops/ops/moments.py": ["ops/test_gptq_nf4.py", "ops/test_gptq_quantize.py"],
    "peftops/ops/multi_lora_linear.py": ["ops/test_multi_lora_linear.py"],
    "peftops/ops/mxfp4_dequantize.py": ["ops/test_mxfp4_dequantize.py"],
    "peftops/ops/mxfp4_linear.py": ["ops/test_mxfp4_linear.py"],
    "peftops/ops/mxfp4_quantize.py": ["ops/test_mxfp4_quantize.py"],
    "peftops/ops/mxfp4_tensor.py": ["ops/test_mxfp4_dequantize.py", "ops/test_packed_tensor.py"],
    "peftops/ops/nf4_dequantize.py": ["ops/test_nf4_dequantize.py"],
    "peftops/ops/nf4_linear.py": ["ops/test_nf4_linear.py"],
    "peftops/ops/nf4_quantize.py": ["ops/test_nf4_quantize.py"],
    "peftops/ops/nf4_rounding.py": ["ops/test_gptq_nf4.py"],
    "peftops/ops/nf4_tensor.py": ["ops/test_nf4_tensor.py", "ops/test_packed_stack.py"],
    "peftops/ops/packed_linear.py": ["ops/test_group_linear.py", "ops/test_nf4_linear.py"],
    "peftops/ops/packed_tensor.py": ["ops/test_packed_tensor.py", "ops/test_nf4_tensor.py", "ops/test_group_tensor.py"],
    "peftops/ops/paged_attention.py": ["ops/test_paged_attention.py"],
    "peftops/ops/qalora_linear.py": ["ops/test_qalora_linear.py"],
    "peftops/ops/row_shards.py": ["ops/test_packed_tensor.py", "integrations/test_distributed.py"],
    "peftops/optim": ["methods/test_relora.py", "methods/test_methods.py"],
    "peftops/optim/adamw8bit.py": ["nn/test_adamw8bit_optimizer.py"],
    "peftops/optim/checkpointing.py": ["nn/test_checkpointing.py"],
    "peftops/planner": ["planner/test_planner.py"],
    "peftops/prompts": ["methods/test_hard_prompt.py", "methods/test_methods.py"],
    "peftops/prompts/batch.py": ["methods/test_prompt_batch.py"],
    "peftops/prompts/chat.py": ["cli/test_data.py"],
    "peftops/prompts/images.py": ["methods/test_image_prompts.py"],
    "peftops/prompts/prefix_cache.py": ["methods/test_prompt_batch.py", "methods/test_methods.py"],
    "peftops/prompts/soft.py": ["methods/test_prompt_batch.py", "methods/test_prompt_start.py"],
    "peftops/prompts/start.py": ["methods/test_prompt_start.py"],
    "peftops/prompts/time_limit.py": ["cli/test_data.py"],
    "peftops/serving": ["serving"],
    "peftops/serving/adapter_pool.py": ["serving/test_adapter_pool.py", "serving/test_adapter_pool_threads.py"],
    "peftops/serving/http": ["serving/test_http.py", "serving/test_http_refusals.py"],
    "peftops/serving/paged.py": ["serving/test_pages.py", "serving/test_server.py"],
    "peftops/serving/paged_attention.py": ["serving/test_pages.py"],
    "peftops/serving/pages.py": ["serving/test_pages.py"],
    "peftops/serving/sampling.py": ["serving/test_sampling.py"],
    "csrc/kernels/cpu/code_columns.h": ["ops/test_mxfp4_linear.py", "ops/test_nf4_linear.py"],
    "csrc/kernels/cpu/code_dot.h": ["ops/test_mxfp4_linear.py", "ops/test_nf4_linear.py"],
    "csrc/kernels/cpu/group_columns.h": ["ops/test_group_linear.py"],
    "csrc/kernels/cpu/group_decode.h": ["ops/test_group_dequantize.py", "ops/test_group_linear.py"],
    "csrc/kernels/cpu/group_dot.h": ["ops/test_group_linear.py"],
    "csrc/kernels/cpu/mxfp4_decode.h": ["ops/test_mxfp4_dequantize.py", "ops/test_mxfp4_linear.py"],
    "csrc/kernels/cpu/mxfp4_rows.h": ["ops/test_mxfp4_linear.py"],
    "csrc/kernels/cpu/nf4_decode.h": ["ops/test_nf4_dequantize.py", "ops/test_nf4_linear.py"],
    "csrc/kernels/cpu/nf4_rows.h": ["ops/test_nf4_linear.py"],
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
    if not file.endswith(".py"):
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        if subprocess.run(build, cwd=copy, env=environment, capture_output=True).returncode:
            return "does not build"
    child = os.fork()
    if not child:
        run_tests(copy, [f"tests/{name}" for name in tests], int(seconds))
    end = time.monotonic() + 20 * seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "SURVIVED" if status == 0 else "caught"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "does not end"


def run_tests(copy: Path, tests: list[str], seconds: int) -> NoReturn:
    """In a child of this process, which has imported what is slow to import and none of what is mutated."""
    os.setpgid(0, 0)
    # By the processor's time: by the clock, a busy machine would catch every mutant. What sleeps ends by the clock.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode, sys.path[0] = True, str(copy)
    code = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", "not cuda-sim and not arm-", *tests])
    finally:
        os._exit(code)


def files_of(only: list[str]) -> list[tuple[str, list[str]]]:
    """Each file that has a line in the table or is in a directory that has one, and each kernel, with its tests."""
    found = {}
    for place in sorted(TESTS, key=len):
        alone = (ROOT / place).is_file()
        for path in [ROOT / place] if alone else sorted((ROOT / place).rglob("*.py")):
            named = [] if alone else (ROOT / "tests").glob(f"*/test_{path.stem}.py")
            own = sorted(str(test.relative_to(ROOT / "tests")) for test in named)
            found[str(path.relative_to(ROOT))] = own or TESTS[place]
    for path in (ROOT / "csrc/kernels/cpu").glob("*.cpp"):
        named = (ROOT / "tests/ops").glob(f"test_{path.stem.removesuffix('_backward')}*.py")
        if own := sorted(str(test.relative_to(ROOT / "tests")) for test in named):
            found[str(path.relative_to(ROOT))] = own
    wanted = [file for file in sorted(found) if any(part in file for part in only)]
    return [(file, found[file]) for file in wanted or found if wanted or (not only and file.endswith(".py"))]


def draw(only: list[str], each: int, total: int, seed: int) -> list[tuple[str, list[str], Change]]:
    """The mutants of a run: as many of each file, or as many in all, one of a file before a second of any."""
    files = files_of(only)
    if not total:
        drawn = [(f, t, mutants(ROOT / f, each, random.Random(f"{seed} {f}"))) for f, t in files]
        return [(file, tests, change) for file, tests, changes in drawn for change in changes]
    random.Random(seed).shuffle(files)
    left = [(f, t, mutants(ROOT / f, total, random.Random(f"{seed} {f}"))) for f, t in files]
    rounds = ((file, tests, next(changes, None)) for _ in range(total) for file, tests, changes in left)
    return list(itertools.islice((drawn for drawn in rounds if drawn[2]), total))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="files whose path has one of these; by default Python")
    parser.add_argument("--mutants", type=int, default=5, help="of each file (default 5)")
    parser.add_argument("--total", type=int, default=0, help="in all, instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=900, help="of the processor, that its tests may take")
    args = parser.parse_args()
    verdicts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_of(ROOT, copy)
        for file, tests, (start, end, new) in draw(args.only, args.mutants, args.total, args.seed):
            text = (copy / file).read_text()  # not the repository's, where somebody may be at work
            (copy / file).write_text(text[:start] + new + text[end:])
            verdict = judge(copy, file, tests, args.seconds)
            verdicts[verdict] += 1
            line = text.count("\n", 0, start)
            where = text.splitlines()[line].strip()
            print(f"{verdict}: {file}:{line + 1}: {text[start:end]!r} -> {new!r}: {where}", flush=True)
            (copy / file).write_text(text)
    print(f"{sum(verdicts.values()) - verdicts['SURVIVED']} of {sum(verdicts.values())} caught: {dict(verdicts)}")


if __name__ == "__main__":
    import hypothesis  # noqa: F401 (a child of this process finds these there: it takes longer than most tests)
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import xdist  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    main()
