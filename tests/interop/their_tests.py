"""Another project's tests, run on ours by pytest: which of them, and what came out, one line for each reason."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# None for a test that runs, the reason for one that is left out, and False for one that is about something else.
Choice = Callable[[pytest.Item], "str | bool | None"]

# Of a test's name and the sentence that it failed with: why ours differs, or None if it must not.
Difference = Callable[[str, str], "str | None"]


class Outcomes:
    """A plugin of pytest that chooses tests and keeps their outcomes."""

    def __init__(self, choose: Choice, differs: Difference):
        self.choose, self.differs = choose, differs
        self.passed: list[str] = []
        self.different: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = {item: self.choose(item) for item in items}
        self.left_out.update({item.nodeid: reason for item, reason in chosen.items() if reason})
        items[:] = [item for item, reason in chosen.items() if reason is None]

    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", SimpleNamespace(message=str(report.longrepr)))
            sentence = " ".join(crash.message.split())
            known = self.differs(report.nodeid, sentence)
            (self.different if known else self.failed)[report.nodeid] = known or sentence
            print(f"{report.nodeid}: {known or 'FAILED'}: {sentence[:300]}", flush=True)
        elif report.skipped:
            self.left_out[report.nodeid] = getattr(report, "wasxfail", "") or report.longrepr[2].removeprefix(
                "Skipped: "
            )
        elif report.when == "call":
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longrepr)


def run(folder: str, files: dict[str, Choice], differs: Difference, options: list[str]) -> None:
    """Run the files of ``folder``, print the outcomes, and leave with status 1 if a test failed that must not.

    ``options`` are given to pytest, such as ``-k NAME``.
    """
    tests = Path(folder).resolve()
    sys.path.insert(0, str(tests.parent))
    outcomes = Outcomes(lambda item: files[item.path.name](item), differs)
    given = [str(tests / name) for name in files]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull]
    quiet += ["--import-mode", "importlib"]
    status = pytest.main([*quiet, "--rootdir", str(tests.parent), *options, *given], plugins=[outcomes])
    for how, reasons in (("left out", outcomes.left_out), ("differ", outcomes.different)):
        for reason, count in collections.Counter(reasons.values()).most_common():
            print(f"{count} {how}: {reason}")
    passed, failed = len(outcomes.passed), len(outcomes.failed)
    print(f"{passed} passed, {failed} failed, {len(outcomes.different)} differ, {len(outcomes.left_out)} left out")
    raise SystemExit(status > 1 or failed > 0)
