"""Files that belong together are the old ones or the new ones, whenever their writer is killed."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from safetensors.torch import load_file

import models
import peftops
from peftops.integrations import files, together
from peftops.integrations.peft_files import CONFIG, OWN, WEIGHTS
from peftops.integrations.together import write_together

KILLS = """
    import os, signal, sys, time, torch, models, peftops
    torch.set_num_threads(1)
    made = [peftops.attach(models.mlp(), peftops.LoRAConfig(r=2, alpha=float(a), target=["0"])) for a in (1, 2)]
    for a, model in enumerate(made, 1):
        for parameter in model.parameters():
            parameter.data.fill_(a)
    peftops.save(made[0], sys.argv[1])
    for kill in range(20):
        child = os.fork()
        while child == 0:
            for model in made:
                peftops.save(model, sys.argv[1])
        time.sleep(0.004 * (1 + kill))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(kill, flush=True)
        sys.stdin.readline()
"""


def alpha_of(folder):
    """Of the adapter that is there, in whose files all say the same."""
    fields, own = (json.loads((folder / name).read_text()) for name in (CONFIG, OWN))
    numbers = {float(t.flatten()[0]) for t in load_file(folder / WEIGHTS).values()}
    assert numbers == {fields["lora_alpha"]} == {own["options"]["alpha"]}
    return fields["lora_alpha"]


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(tmp_path):
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "log").write_text("kept")
    (out / "report.json").write_text("kept, too")
    code = [sys.executable, "-c", textwrap.dedent(KILLS), str(out)]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        for _ in killer.stdout:
            alpha_of(out)
            killer.stdin.write("\n")
            killer.stdin.flush()
    peftops.save(peftops.attach(models.mlp(), peftops.LoRAConfig(r=2)), out)
    assert names(tmp_path) == sorted(
        ["out", *(f"out/{n}" for n in (CONFIG, OWN, WEIGHTS, "report.json", "runs", "runs/log"))]
    )
    assert (out / "runs" / "log").read_text() == "kept" and (out / "report.json").read_text() == "kept, too"


STOPS = [
    (files, "durable"),
    (together, "durable"),
    (together, "_link_others"),
    (together, "_exchange"),
    (together, "_move_others"),
    (os, "replace"),
    (os, "rename"),
    (os, "chmod"),
]


def stopping(call, count, last):
    def counted(*args, **kw):
        count[0] += 1
        if count[0] == last:
            raise KeyboardInterrupt
        return call(*args, **kw)

    return counted


@pytest.mark.parametrize("exchanges", [True, False])
def test_wherever_it_stops_all_files_are_old_or_new(tmp_path, monkeypatch, exchanges):
    """Every call that touches the disk is once the last one: as a full disk or an interrupt would have it."""
    for last in range(60):
        out = tmp_path / str(last) / "out"
        (out / "sub").mkdir(parents=True)
        (out / "other").write_text("kept")
        (out / "sub" / "file").write_text("kept")
        for name in "abc":
            (out / name).write_text("old")
        count = [0]
        with monkeypatch.context() as patched:
            if not exchanges:
                patched.setattr(together, "_exchange", lambda a, b: False)
            for module, name in STOPS:
                if (module, name) == (together, "_exchange") and not exchanges:
                    continue

                patched.setattr(module, name, stopping(getattr(module, name), count, last))
            try:
                write_together(out, {name: lambda path: path.write_text("new") for name in "abc"})
            except KeyboardInterrupt:
                assert last
        found = {(out / name).read_text() for name in "abc"}
        if exchanges:
            assert len(found) == 1, (last, found)
        assert found <= {"old", "new"}
        write_together(out, {name: lambda path: path.write_text("newer") for name in "abc"})
        assert names(out.parent) == ["out", "out/a", "out/b", "out/c", "out/other", "out/sub", "out/sub/file"]
        assert {(out / name).read_text() for name in "abc"} == {"newer"} and (out / "other").read_text() == "kept"
        if last and count[0] < last:
            break
    assert last < 59 and found == {"new"}


def test_a_directory_keeps_its_rights_and_its_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    real.chmod(0o750)
    link.symlink_to(real)
    write_together(link, {"a": lambda path: path.write_text("1")})
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o750 and (real / "a").read_text() == "1"
    assert (real / "a").stat().st_mode & 0o777 == 0o666 & ~files._umask()


def test_what_another_writer_holds_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with together._beside(out, {}) as busy:
        write_together(out, {"a": lambda path: path.write_text("1")})
        assert busy.is_dir()
    assert names(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, fill: write_together(folder, {"a": fill}),
        lambda folder, fill: files.write_atomically(folder / "a", fill),
    ],
    ids=["together", "one"],
)
def test_a_file_is_durable_before_it_has_its_name(tmp_path, monkeypatch, write):
    """A power cut right after the last call must not leave an empty file under the new name."""
    order, sync = [], os.fsync
    inode = lambda handle: os.fstat(handle).st_ino
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append(("sync", inode(handle))), sync(handle)))
    for module, name in ((os, "replace"), (together, "_exchange")):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, call=call: (order.append(("name", 0)), call(*a))[1])
    write(tmp_path, lambda path: path.write_text("new"))
    first = order.index(("sync", (tmp_path / "a").stat().st_ino))
    assert first < order.index(("name", 0))
