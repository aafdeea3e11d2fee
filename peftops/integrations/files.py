"""Writing files so that a crash, a full disk or a power cut leaves the old one or the new one, whole."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MODEL_FILES = ("config.json", "tokenizer*", "chat_template*", "*.safetensors", "*.gguf")
_SLICES, _SLICE = 32, 1 << 16  # of a file that stand for it


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, make it durable, then give it its name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        finish(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finish(path: Path) -> None:
    """Give a temporary file the rights of any new file, and make it durable."""
    os.chmod(path, 0o666 & ~_umask())
    durable(path)


def durable(path: Path) -> None:
    """Make a file, or a directory's list of files, survive a power cut."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        if path.is_dir():  # Windows opens none
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_directory(path: str | os.PathLike, need: int = 0) -> Iterator[Path]:
    """A directory to write to. It gets the name ``path`` when the block is done, and is deleted if the block fails.

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
    """The absolute path of a directory that does not exist or is empty; raises an OSError if it has entries."""
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
    except OSError as error:
        raise OSError(f"cannot write to directory {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):  # a file written as a test would stay if the process were killed
        raise OSError(f"cannot write to directory {folder}: {os.strerror(errno.EACCES)}")
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize if hasattr(os, "statvfs") else need
    if free < need:
        raise OSError(f"the disk of {folder} has {free / 2**20:.0f} MiB free, but {need / 2**20:.0f} MiB are needed")
    return folder


def fingerprint(path: Path) -> str:
    """Facts that distinguish a model from another one: names and sizes of its files, and slices of their content."""
    files = [path] if path.is_file() else sorted({f for pattern in _MODEL_FILES for f in path.glob(pattern)})
    made = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        made.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for i in range(_SLICES):
                opened.seek(i * max(_SLICE, size // _SLICES))
                made.update(opened.read(_SLICE))
    return made.hexdigest()[:16]
