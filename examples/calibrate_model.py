"""What calibration takes back of what 4 bits cost: held-out loss of a model dense, in NF4, in calibrated NF4.

    python examples/calibrate_model.py --text definitions      # WordNet's training rows to calibrate with
    python examples/calibrate_model.py --text manual           # Python's own help texts

Both are tried on held-out text of both kinds: WordNet's evaluation rows, and help texts of other topics. The model is
the demo's SmolLM2-135M (see finetune_smollm2.py), or the one in --model DIR. With --merge RUN, a directory of
`peftops finetune --method qlora` on this model, it tells what merging that adapter into NF4 loses, as it is done by
default and with calibration.
"""

import argparse
import pydoc_data.topics
import warnings
from pathlib import Path

import torch

import peftops
from finetune_smollm2 import DATA, smollm2
from peftops.cli.data import Row, encode, read_rows
from peftops.cli.model import load_tokenizer
from peftops.cli.quantize import some_rows
from peftops.cli.training import evaluate

HELD_OUT = {"definitions": 100, "manual": 8}  # rows


def texts(tokenizer) -> dict[str, tuple[list, list]]:
    """By kind: what to calibrate with, what to measure on."""
    topics = list(pydoc_data.topics.topics.values())
    manual = [encode([Row(text="\n".join(part))], tokenizer, 512) for part in (topics[:40], topics[40:60])]
    words = [encode(read_rows(DATA / f"wordnet_nouns_{part}.jsonl"), tokenizer, 512) for part in ("train", "eval")]
    return {"definitions": tuple(words), "manual": tuple(manual)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a directory with a model and its tokenizer")
    parser.add_argument("--text", choices=HELD_OUT, default="definitions", help="to calibrate with")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--damping", type=float)
    parser.add_argument("--merge", type=Path)
    args = parser.parse_args()
    source = args.model or smollm2()
    tokenizer = load_tokenizer(source)
    data = texts(tokenizer)
    config = peftops.CalibrationConfig(damping=args.damping)
    rows = some_rows(data[args.text][0], args.tokens)

    def measure(name: str, model: torch.nn.Module) -> list[float]:
        losses = [evaluate(model, data[kind][1][:count], 8, 2) for kind, count in HELD_OUT.items()]
        print(f"{name:24}" + "".join(f"{loss:14.4f}" for loss in losses), flush=True)
        return losses

    print(
        f"calibrated on {args.text}, {sum(map(len, rows)):,} tokens; held-out loss\n{'':24}"
        + "".join(f"{kind:>14}" for kind in HELD_OUT)
    )
    if args.merge:
        trained = lambda: peftops.load(peftops.load_model(source), args.merge)
        model = trained()
        measure("trained, not merged", model)
        warnings.simplefilter("ignore")  # about what this measures
        print(peftops.merge(model))
        measure("merged into NF4", model)
        model = trained()
        peftops.merge(model, dense=True)
        peftops.detach(model, merged=True)
        model, report = peftops.quantize_model(model, rows, config)
        print(report)
        measure("merged and calibrated", model)
        return
    dense = measure("dense", peftops.load_model(source, quantize=False))
    plain = measure("NF4", peftops.load_model(source))
    model, report = peftops.quantize_model(source, rows, config)
    found = measure("NF4, calibrated", model)
    back = [1 - (c - a) / (b - a) for a, b, c in zip(dense, plain, found, strict=True)]
    print("taken back of NF4's loss" + "".join(f"{share:14.0%}" for share in back) + f"\n{report}")


if __name__ == "__main__":
    main()
