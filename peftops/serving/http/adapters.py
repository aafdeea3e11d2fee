"""The adapters that clients may ask for by name: loaded, replaced and unloaded while others are in use."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...integrations.peft_files import CONFIG
from ..adapter_pool import AdapterPool
from ..adapters import add_adapter
from .errors import ApiError, bad, no_model

log = logging.getLogger("peftops.serve")
_NAME = re.compile(r"[\w.@/:-]{1,128}")


@dataclass
class Entry:
    """An adapter with one name, read from one state of its files."""

    name: str
    key: str  # its name in the pool; another state of the same adapter has another name
    path: Path
    used: int = 0
    retired: bool = False


class Adapters:
    """The names of adapters, and the adapters in the pool that they mean.

    An adapter that is unloaded or replaced gets no new requests. Requests that have it keep it until they end, and then
    it leaves the pool.

    Args:
        pool: of the server.
        base: the name of the model without an adapter.
        most: the largest number of loaded adapters.
        check: raises ValueError if the adapter in a directory does not belong on this base.
    """

    def __init__(
        self, pool: AdapterPool, base: str, *, most: int = 10_000, check: Callable[[Path], None] | None = None
    ):
        self.base = base
        self._pool, self._most, self._check = pool, most, check
        self._live: dict[str, Entry] = {}
        self._loading: set[str] = set()
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._live)

    def load(self, name: str, path: Path, *, replace: bool = False) -> None:
        """Read an adapter and serve it under its name. With ``replace``, it may take the name of another adapter.

        Raises:
            ApiError: 400, the name is taken or unfit, there are too many, or the files are not an adapter of this base.
                Nothing has changed then.
        """
        if not _NAME.fullmatch(name):
            raise bad("an adapter's name has 1 to 128 letters, digits and ._-@/:", param="lora_name")
        with self._lock:
            if name == self.base or name in self._loading or (name in self._live and not replace):
                raise bad(f"there is a model named {name!r} already", "name_taken", "lora_name")
            if len(self._live) + len(self._loading) >= self._most and name not in self._live:
                raise bad(f"the server holds {self._most} adapters, which is its limit", "too_many_adapters")
            self._loading.add(name)
            key = f"{name}#{next(self._numbers)}"
        try:
            if self._check is not None:
                self._check(path)
            add_adapter(self._pool, key, path)
        except (OSError, TypeError, ValueError) as error:
            why = " ".join(str(error).split()).replace(repr(key), repr(name))
            why = why.replace(str(path), path.name)  # clients must not see paths of this machine
            raise bad(f"cannot load {name!r}: {why}", "bad_adapter", "lora_path") from error
        else:
            with self._lock:
                old, self._live[name] = self._live.get(name), Entry(name, key, path)
        finally:  # only now, because another adapter could have taken the name
            with self._lock:
                self._loading.discard(name)
        self._change(old, retired=True)

    def unload(self, name: str) -> None:
        """Stop serving a name; 404 if there is no adapter of that name."""
        with self._lock:
            old = self._live.pop(name, None)
        if old is None:
            raise ApiError(404, "there is no adapter of this name", "adapter_not_found", "lora_name")
        self._change(old, retired=True)

    def borrow(self, model: str, times: int) -> Entry | None:
        """The adapter that a request names, kept until :meth:`give_back`; None for the base."""
        if model == self.base:
            return None
        with self._lock:
            entry = self._live.get(model)
            if entry is None:
                raise no_model()
            entry.used += times
            return entry

    def give_back(self, entry: Entry | None) -> None:
        self._change(entry, used=-1)

    def _change(self, entry: Entry | None, *, used: int = 0, retired: bool = False) -> None:
        """A retired adapter leaves the pool when its last request gives it back."""
        if entry is None:
            return
        with self._lock:
            entry.used += used
            entry.retired |= retired
            over = entry.retired and not entry.used
        if over:
            self._pool.remove(entry.key)


class Watched:
    """A directory whose adapters are loaded when they appear, loaded again when they change, and unloaded when they are
    removed.

    Files are read when two looks in a row have found them the same, so that no file is read while it is written. An
    adapter that cannot be read is logged once, and tried again when its files change.
    """

    def __init__(self, adapters: Adapters, folder: Path):
        self._adapters, self._folder = adapters, folder
        self._seen: dict[str, object] = {}
        self._tried: dict[str, object] = {}
        self._mine: set[str] = set()

    def look(self, *, settled: bool = False) -> None:
        """Look into the directory. With ``settled``, files are read at the first look."""
        try:
            there = {path.name: _state(path) for path in sorted(self._folder.iterdir()) if (path / CONFIG).is_file()}
        except OSError as error:  # a mount may be away for a moment: loaded adapters stay
            log.warning("cannot look into the watched directory: %s", error.strerror)
            return
        for name, state in there.items():
            same = settled or self._seen.get(name) == state
            if same and self._tried.get(name) != state:
                self._tried[name] = state
                try:
                    self._adapters.load(name, self._folder / name, replace=name in self._mine)
                    self._mine.add(name)
                    log.info("loaded the adapter %s", name)
                except ApiError as error:
                    log.warning("%s", error.message)
        for name in set(self._tried) - set(there):
            del self._tried[name]
            if name in self._mine:
                self._mine.discard(name)
                try:
                    self._adapters.unload(name)
                    log.info("unloaded the adapter %s", name)
                except ApiError:
                    pass  # a client has unloaded it
        self._seen = there


def _state(folder: Path) -> object:
    files = []
    for path in sorted(folder.iterdir()):
        try:
            stat = path.stat()
        except OSError:
            continue  # it was renamed meanwhile: the next look sees another state
        files.append((path.name, stat.st_mtime_ns, stat.st_size))
    return files
