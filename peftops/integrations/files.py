"""Writing files so that a crash, a full disk or a power cut leaves the old one or the new one, whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
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
