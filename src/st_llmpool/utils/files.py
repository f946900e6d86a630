"""Atomic file and directory writes (temporary sibling, then rename), locked folders, and names that disks can hold."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from ..modules.errors import ConfigurationError, DataError, StLlmpoolError
from .reading import shown

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_SUFFIX = ".partial"
_OLD = f"-old{_SUFFIX}"
_COUNTER = itertools.count()


class WriteError(StLlmpoolError, OSError):
    """A file or folder cannot be written: the disk is full or read-only, or access is denied."""


def slug(title: str) -> str:
    """Return `title` with characters replaced that are not allowed in file or repository names."""
    return re.sub(r"[^\w.-]+", "-", title).strip("-.")


def is_there(path: Path) -> bool:
    """Return whether anything has this path, even a link that leads nowhere."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{shown(str(path))} is no name for a file or folder.") from error
    return True


def check_writable(target: Path) -> None:
    """Check that files can be created in `target`, a folder which need not exist yet."""
    place = next(folder for folder in (target.absolute(), *target.absolute().parents) if is_there(folder))
    if not place.is_dir():
        raise ConfigurationError(f"{target} cannot be used for output, as {place} is not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise WriteError(f"{target} cannot be written, as {place} is read-only; choose another place.")


def check_new_folder(target: Path) -> None:
    """Check that `target` can be created; to be called before anything is computed."""
    if is_there(target):
        raise ConfigurationError(f"{target} exists; choose another folder, or remove it.")
    check_writable(target)
    for folder in target.resolve().parents:
        if (folder / "modules.json").is_file():
            raise ConfigurationError(f"{target} would lie in the saved model {folder}; choose another place.")


def check_model_path(model: str) -> None:
    """Check that `model` exists if it is a path and not a Hub id; to be called before heavy imports.

    Example:
        >>> check_model_path("org/model")
        >>> check_model_path("./none")
        Traceback (most recent call last):
        ...
        st_llmpool.modules.errors.DataError: ./none does not exist: name a folder with a saved model, or a Hub id.
    """
    is_path = model.startswith((".", "/", "~")) or os.path.isabs(model) or model.count("/") > 1
    if is_path and not Path(model).exists():
        raise DataError(f"{model} does not exist: name a folder with a saved model, or a Hub id.")


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file atomically: neither a kill nor, if `durable`, a power failure leaves a partial file."""
    with atomic_file(path, durable=durable) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, renamed to `path` at the end and removed on an error."""
    with reraise_as_write_error(path):
        _remove_partials_of_the_dead(path)
        partial = _sibling(path)
        try:
            yield partial
            if durable:
                _sync(partial)
            partial.replace(path)
            if durable:
                _sync(path.parent)
        finally:
            with suppress(OSError):  # renamed, or on a disk that became read-only
                partial.unlink()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share_files(folder: Path, shared: Path) -> None:
    """Replace the weight files of a saved model by hard links to equal ones in `shared`, which the first ones become.

    Where the file system has no links they stay as they are.

    Example:
        >>> for name in ("a", "b"):
        ...     Path(name).mkdir()
        ...     _ = Path(name, "model.safetensors").write_bytes(b"weights")
        ...     share_files(Path(name), Path("shared"))
        >>> Path("a/model.safetensors").samefile("b/model.safetensors")
        True
    """
    for file in folder.glob("*.safetensors"):
        with suppress(OSError):
            first = shared / file_digest(file)
            shared.mkdir(parents=True, exist_ok=True)
            if not first.exists():
                os.link(file, first)
            elif not first.samefile(file):
                with atomic_file(file, durable=False) as partial:
                    os.link(first, partial)


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder of `target`, renamed to `target` at the end and removed on an error.

    An existing folder is refused, or with `replace` stays until the new one is complete.

    Processes that write the same target at once do not disturb each other: each has its own sibling.
    """
    with reraise_as_write_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_partials_of_the_dead(target)
        partial = _sibling(target)
        partial.mkdir()
        try:
            yield partial
            _sync_tree(partial)
            _rename(partial, target, replace=replace)
            _sync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def reraise_as_write_error(target: Path) -> Iterator[None]:
    """Re-raise library errors about a full or read-only disk as a `WriteError` that names `target`."""
    try:
        yield
    except StLlmpoolError:
        raise
    except Exception as error:
        reason = _disk_error(error, target)
        if reason is None:
            raise
        raise WriteError(
            f"{target} cannot be written: {reason}. Free space or choose another place; what was there is intact."
        ) from error


def _disk_error(error: BaseException, target: Path) -> str | None:
    """Return what the system says of a disk that cannot be written; None if that is not what went wrong."""
    if isinstance(error, OSError):
        within = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(target.parent)
        denied = isinstance(error, PermissionError | NotADirectoryError | FileNotFoundError) and within
        if error.errno in _DISK_ERRORS or (denied and not _can_be_written(target.parent)):
            return os.strerror(error.errno or 0)
    for number in _DISK_ERRORS:  # libraries in other languages keep only the text
        if f"os error {number})" in str(error) or os.strerror(number) in str(error):
            return os.strerror(number)
    if "PytorchStreamWriter failed" in str(error) or "inline_container" in str(error):
        return "the disk took only part of a file"
    return None


def _can_be_written(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _sibling(path: Path) -> Path:
    """Return a unique hidden sibling of `path` that names the process that writes it."""
    owner = f"{os.getpid()}-{_status(os.getpid())[1]}-{_host()}-{next(_COUNTER)}"
    return path.with_name(f".{path.name[:150]}.{owner}{_SUFFIX}")


def _remove_partials_of_the_dead(path: Path) -> None:
    """Remove temporary siblings of `path` left by killed processes of this machine."""
    start = f".{path.name[:150]}."
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        if left.name.startswith(start) and left.name.endswith(_SUFFIX):
            pid, started, host, *_ = (*left.name[len(start) : -len(_SUFFIX)].split("-"), "", "")
            if host not in ("", _host()) or not pid.isdecimal() or is_alive(int(pid), started):
                continue
            if left.name.endswith(_OLD) and not path.exists():
                left.rename(path)  # killed between the two renames of a replacement
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _rename(partial: Path, target: Path, *, replace: bool) -> None:
    """Rename a folder, after the one that it replaces was set aside, in a race with others that do the same."""
    aside = partial.with_name(partial.name.removesuffix(_SUFFIX) + _OLD)
    while True:
        if replace:
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(FileNotFoundError):  # there is none, or another process has just moved it
                target.rename(aside)
        try:
            partial.rename(target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if aside.exists():
                    aside.rename(target)
                raise
            if not replace:
                raise ConfigurationError(
                    f"Another process created {target} in the meantime; choose another folder."
                ) from error
    shutil.rmtree(aside, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Flush files to disk; they get the user's usual permissions, which safetensors 0.8 does not give to weights."""
    mode = folder.stat().st_mode & 0o666
    for parent, _, files in os.walk(folder):
        for name in files:
            Path(parent, name).chmod(mode)
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder."""
    if os.name == "nt" or path.is_symlink():  # Windows syncs neither folders nor what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    """Return a short name of the machine, or of the container, in which a process id has a meaning."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {namespace}'.encode()):08x}"


def is_alive(pid: int, started: str = "") -> bool:
    """Return whether a process of this machine runs; `started` (ticks) distinguishes a later one with its id."""
    if os.name == "nt":  # where os.kill(pid, 0) would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    state, now = _status(pid)
    return state != "Z" and (not started or not now or now == started)


def _status(pid: int) -> tuple[str, str]:
    """Return a process's state (Z is ended, but not yet waited for) and its start; empty where none can be read."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = status.rpartition(")")[2].split()
    return fields[0], fields[19]


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
