"""Writing files so that a crash, a full disk or a power cut leaves the old one or the new one, whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, make it durable, then give it its name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: str | os.PathLike, need: int = 0) -> Iterator[Path]:
    """A directory to write to, which is called ``path`` once the block is done, and is gone if the block fails.

    Raises:
        OSError: ``path`` is there and not empty, cannot be written, or its disk has less room than ``need`` bytes.
    """
    path = check_new_directory(path)
    parent = writable_directory(path.parent, need)
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_directory(path: str | os.PathLike) -> Path:
    """The whole path of a directory that is not there yet, or empty; an OSError if it holds something."""
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a directory")
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} holds files already, which would be overwritten; give a new directory")
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def writable_directory(path: str | os.PathLike, need: int = 0) -> Path:
    """Make the directory if it is not there, and make sure that files of ``need`` bytes can be written to it.

    Raises:
        OSError: it cannot be made, is not a directory or not writable, or its disk is too full; in a sentence.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"peftops")
    except OSError as error:
        raise OSError(f"cannot write to directory {folder}: {error.strerror}") from error
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize if hasattr(os, "statvfs") else need
    if free < need:
        raise OSError(f"the disk of {folder} has {free / 2**20:.0f} MiB free, but {need / 2**20:.0f} MiB are needed")
    return folder
