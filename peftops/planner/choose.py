"""Which method to choose, and why: rules in a table, and the first method of a rule that fits."""

from __future__ import annotations

from dataclasses import dataclass, field

from .estimate import Estimate
from .table import traits_of

MANY = 1000  # tasks: from this number on, the size of an adapter matters most


@dataclass(frozen=True)
class Want:
    """A wish, the methods that fulfil it, best first, and the reason for this choice."""

    methods: tuple[str, ...]
    why: str


WANTS: dict[str, Want] = {
    "quality": Want(
        ("lora", "dora", "pissa", "olora", "glora", "qlora", "lorafa", "toplayers"),
        "LoRA on all linear layers is the best known trade of quality, time and memory; its base in 4 bits where a "
        "dense one does not fit",
    ),
    "4bit": Want(
        ("qalora", "lqlora", "loftq", "qlora"),
        "the model stays in 4 bits when deployed: QA-LoRA merges into them exactly, the others serve beside them",
    ),
    "start": Want(("pissa", "olora", "loftq", "lora"), "factors of the weight itself learn fastest in a few steps"),
    "merged": Want(
        ("lora", "pissa", "dora", "glora", "lorafa", "tiedlora", "vera"),
        "merged into the weights, these cost nothing when the model answers",
    ),
    "small": Want(
        ("tiedlora", "vera", "ia3", "prompttuning", "normtuning", "bitfit"),
        "each task's file is a small fraction of LoRA's",
    ),
    "mixture": Want(("multilora", "bottleneck", "lora"), "several tasks in one adapter want more than one subspace"),
    "memory": Want(
        ("qlora", "lorafa", "headonly", "toplayers", "qalora", "prompttuning"),
        "4-bit weights and adapters that keep no inputs take least",
    ),
    "high-rank": Want(("relora", "multilora", "lora"), "restarts add up to more than any one low rank"),
    "long-context": Want(("longlora", "lora"), "attention in shifted groups trains long rows at the cost of short"),
    "instructions": Want(
        ("llamaadapter", "prefixtuning", "lora"), "gated prompts start as the base model and disturb little it knows"
    ),
    "few-examples": Want(("ia3", "bitfit", "normtuning", "prompttuning"), "few parameters cannot overfit much"),
    "input-shift": Want(("surgical", "bitfit", "lora"), "inputs that look different ask for the first block alone"),
    "output-shift": Want(("headonly", "toplayers", "lora"), "other labels for the same features ask for the top alone"),
}

TASKS = Want(
    ("lora", "qlora", "bottleneck", "prefixtuning"),
    "one base serves all tasks, with an adapter per request in one batch (peftops.Server)",
)


@dataclass(frozen=True)
class Choice:
    """The chosen method's estimate, or None if no method fits, and the reasons, one sentence each."""

    estimate: Estimate | None
    reasons: list[str] = field(default_factory=list)


def choose(estimates: list[Estimate], memory: int, *, want: str = "quality", tasks: int = 1) -> Choice:
    """The method to train with.

    Args:
        memory: bytes.
        want: what matters most, one of :data:`WANTS`.
        tasks: how many adapters are to be trained for one base; it changes the choice only if ``want`` is "quality".

    Raises:
        ValueError: memory or tasks is below 1, or ``want`` is unknown.

    Examples:
        >>> from peftops.planner import Estimate, choose
        >>> choose([Estimate("lora", weights=900), Estimate("qlora", weights=300)], memory=500).estimate.method
        'qlora'
    """
    if want not in WANTS:
        raise ValueError(f"want must be one of {', '.join(WANTS)}, not {want!r}")
    if memory < 1 or tasks < 1:
        raise ValueError(f"memory and tasks must be at least 1, not {memory} and {tasks}")
    rule = WANTS[want]
    if want == "quality" and tasks > 1:
        rule = TASKS if tasks < MANY else WANTS["small"]
    by_name, reasons, too_large = {e.method: e for e in estimates}, [f"{rule.why}."], []
    fits = lambda e: e.why_not is None and e.total <= memory
    for found in (by_name[name] for name in rule.methods if name in by_name):
        if fits(found):
            return Choice(found, reasons + _facts(found, memory, tasks) + _hint(too_large))
        if found.why_not:
            reasons.append(f"{found.method} cannot be used here: {found.why_not}.")
        else:
            too_large.append(found.method)
            reasons.append(f"{found.method} does not fit: it takes {gib(found.total)}.")
    fitting = sorted(filter(fits, estimates), key=lambda e: (e.total, e.method))
    if not fitting:
        return Choice(None, [*reasons, "No other method fits either.", *_hint(too_large)])
    reasons.append(f"Of all others, {fitting[0].method} takes least.")
    return Choice(fitting[0], reasons + _facts(fitting[0], memory, tasks) + _hint(too_large))


def _hint(too_large: list[str]) -> list[str]:
    cheaper = "fewer or shorter rows at once (--batch, --max-length), or --checkpointing"
    return [f"There may be room for {too_large[0]} with {cheaper}."] if too_large else []


def _facts(found: Estimate, memory: int, tasks: int) -> list[str]:
    traits = traits_of(found.method)
    facts = [
        f"It takes {gib(found.total)} of {gib(memory)}.",
        f"Overhead in computing: {traits.overhead}; effect on quality: {traits.quality}.",
    ]
    if traits.high_rate:
        facts.append("It wants a learning rate 10 to 50 times LoRA's.")
    if tasks > 1:
        facts.append(f"All {tasks} adapters together: {gib(tasks * found.adapter)}, on disk or in host memory.")
    return facts


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
