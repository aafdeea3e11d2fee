"""Several files of a directory, replaced in one step: if the writer is killed, the directory has either all old files
or all new ones.

No system call replaces several files at once, but one exchanges two directories. So the files are written to a second
directory, which gets the other files of the first one as hard links, and then the two are exchanged. A killed writer
leaves such a directory; the next writer removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .files import durable, finish

_MARK = ".peftops-saving."
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def write_together(folder: Path, files: Mapping[str, Callable[[Path], None]]) -> None:
    """Let each of ``files`` write the file of that name in ``folder``, which exists; either all of them are replaced or
    none.

    If the system cannot exchange directories (it is not Linux, or ``folder`` is a disk of its own), each file is
    replaced in one step, but not all of them together.
    """
    folder = folder.resolve()
    _clear(folder, files)
    with _beside(folder, files) as beside:
        for name, write in files.items():
            write(beside / name)
            finish(beside / name)
        _link_others(folder, beside, files)
        os.chmod(beside, stat.S_IMODE(folder.stat().st_mode))
        durable(beside)
        if _exchange(beside, folder):
            durable(folder.parent)
        else:
            for name in files:
                os.replace(beside / name, folder / name)
            durable(folder)


def _places(folder: Path) -> tuple[Path, Path]:
    """The places for the second directory: beside the first one, or in it if the parent is not writable."""
    return folder.parent, folder


@contextlib.contextmanager
def _beside(folder: Path, files: Mapping[str, object]) -> Iterator[Path]:
    """A directory that is locked while its writer lives, and is deleted afterwards."""
    place = next((place for place in _places(folder) if os.access(place, os.W_OK | os.X_OK)), folder)
    beside = Path(tempfile.mkdtemp(dir=place, prefix=f".{folder.name}{_MARK}"))
    handle = _locked(beside)
    try:
        yield beside
    finally:
        try:
            _move_others(beside, folder, files)
            shutil.rmtree(beside, ignore_errors=True)
        finally:
            if handle is not None:
                os.close(handle)


def _locked(folder: Path) -> int | None:
    """A handle that holds the lock of a directory; None if another process has the lock, or the system has no such
    locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _clear(folder: Path, files: Mapping[str, object]) -> None:
    """Remove the directories of killed writers, after moving back files that they had not yet moved."""
    for place in _places(folder):
        for beside in place.glob(f".{folder.name}{_MARK}*"):
            handle = _locked(beside)
            if handle is not None:
                _move_others(beside, folder, files)
                shutil.rmtree(beside, ignore_errors=True)
                os.close(handle)


def _link_others(folder: Path, beside: Path, files: Mapping[str, object]) -> None:
    for path in folder.iterdir():
        if path.name not in files and (path.is_symlink() or not path.is_dir()):
            with contextlib.suppress(OSError):  # no hard links here: it is moved
                os.link(path, beside / path.name, follow_symlinks=False)


def _move_others(beside: Path, folder: Path, files: Mapping[str, object]) -> None:
    """Move the entries that the directory lacks: subdirectories, which cannot have two names, and files that were made
    meanwhile."""
    for path in beside.iterdir():
        if path.name not in files and not os.path.lexists(folder / path.name):
            os.rename(path, folder / path.name)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two directories; returns False if the system or the disk cannot do that."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0
