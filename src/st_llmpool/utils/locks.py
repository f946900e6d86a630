"""Lock a folder for one process at a time; a killed process does not keep its lock."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from ..modules.errors import ConfigurationError
from .files import is_alive, is_there, reraise_as_write_error

_FILE = ".lock"
_PATIENCE = 0.5  # seconds; taking over the lock of a dead process needs a second attempt


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create and lock `folder`, and remove it at the end if it is empty.

    The lock is a file with the process, its start time and the machine. Only the lock of a process of this machine that
    has ended is taken over: whether a process of another machine still runs is unknown.
    """
    if is_there(folder) and not folder.is_dir():
        what = "a link that leads nowhere" if folder.is_symlink() else "a file"
        raise ConfigurationError(f"{str(folder)!r} is {what}; name a folder.")
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = SoftFileLock(folder / _FILE, timeout=_PATIENCE)
    with reraise_as_write_error(folder / _FILE):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with reraise_as_write_error(folder / _FILE):
            _acquire(lock, folder)
        try:
            yield
        finally:
            lock.release()
    finally:
        with suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _acquire(lock: SoftFileLock, folder: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        pid, host = _owner(folder)
        if host != socket.gethostname() or is_alive(pid):
            raise ConfigurationError(_refusal(folder, pid, host)) from None
        (folder / _FILE).unlink(missing_ok=True)  # ended, but not yet reaped: filelock treats it as alive
        lock.acquire()


def _refusal(folder: Path, pid: int, host: str) -> str:
    with suppress(OSError):
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / _FILE).stat().st_mtime))
        way_out = "Wait until it ends, or choose another folder."
        if host != socket.gethostname():
            way_out = f"If it has ended, delete {folder / _FILE}; else wait, or choose another folder."
        return f"{str(folder)!r} is in use by process {pid} on {host or 'an unknown machine'} since {since}. {way_out}"
    return f"{str(folder)!r} was in use until now; try again."


def _owner(folder: Path) -> tuple[int, str]:
    """Return process and machine of a lock; filelock writes them in its first two lines."""
    with suppress(OSError, ValueError):
        pid, host, *_ = (folder / _FILE).read_text(encoding="utf-8").splitlines()
        return int(pid), host.partition("?")[0]  # a container's process namespace follows the mark
    return 0, ""
