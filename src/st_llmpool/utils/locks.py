"""A folder in which one process works at a time; what a killed process left locked is free at once."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from ..modules.errors import ConfigurationError
from .files import is_alive, reraise_as_write_error
from .reading import shown

_FILE = ".lock"
_PATIENCE = 0.5  # seconds; to take a lock over from a dead process needs a second look


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes out of it; removes it at the end if nothing was put into it.

    The lock is a file that names its process, the machine and when that process started. It is taken over from a
    process of this machine that has ended, killed or not, and from nobody else: whether a process of another machine
    still runs cannot be seen from here.

    Args:
        folder: The folder.

    Raises:
        ConfigurationError: If another process works in it; the message names it and the way out.
        WriteError: If the folder cannot be made.

    Example:
        >>> with locked_folder(Path("run")):
        ...     with locked_folder(Path("run")):
        ...         pass
        Traceback (most recent call last):
        ...
        st_llmpool.modules.errors.ConfigurationError: 'run' is in use by process ...
    """
    try:
        folder.lstat()
        there = True
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        there = False
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        raise ConfigurationError(f"{shown(str(folder))} is no name for a folder.") from error
    if there and not folder.is_dir():
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
        (folder / _FILE).unlink(missing_ok=True)  # ended, but not yet waited for: filelock takes it for alive
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
    """Returns process and machine of a lock; filelock writes them in its first two lines."""
    with suppress(OSError, ValueError):
        pid, host, *_ = (folder / _FILE).read_text(encoding="utf-8").splitlines()
        return int(pid), host.partition("?")[0]  # a container's process namespace follows the mark
    return 0, ""
