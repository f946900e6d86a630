"""Files and folders that are complete or absent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.utils import files
from st_llmpool.utils.files import (
    WriteError,
    atomic_file,
    atomic_folder,
    locked_folder,
    reraise_as_write_error,
    slug,
    write_atomically,
)

WRITER = """
import sys, time
from pathlib import Path
from st_llmpool.utils.files import atomic_file, atomic_folder
with {manager}(Path(sys.argv[1]){options}) as partial:
    (partial / "a" if partial.is_dir() else partial).write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
    (partial / "b" if partial.is_dir() else partial).write_text("whole")
"""


@pytest.fixture
def start_writer():
    """`start_writer(path, manager, options)` starts a process that has written half and waits for a line."""
    started = []

    def start(path, manager="atomic_folder", options=""):
        code = WRITER.format(manager=manager, options=options)
        command = [sys.executable, "-c", code, str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_there_only_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert names(target.parent) == ["model"]


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()

    def fail():
        with atomic_folder(target, replace=True) as folder:
            (folder / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with atomic_folder(tmp_path / "model", replace=True) as folder:
        (folder / "new").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "new"]


@pytest.mark.parametrize("name", ["model", "model[1]", "m" * 240])
@pytest.mark.parametrize("reaped", [True, False])
def test_what_a_killed_process_left_is_removed_at_the_next_write(tmp_path, start_writer, name, reaped):
    process = start_writer(tmp_path / name)
    process.kill()
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the table of processes
    assert len(names(tmp_path)) == 1
    with atomic_folder(tmp_path / name) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == [name]
    assert names(tmp_path / name) == ["new"]


def test_the_folder_of_a_live_process_is_left_alone_and_completed(tmp_path, start_writer):
    process = start_writer(tmp_path / "model", options=", replace=True")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "first").touch()
    process.communicate("go\n")
    assert process.returncode == 0
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["a", "b"]


def test_two_processes_that_make_one_folder_do_not_mix(tmp_path, start_writer):
    process = start_writer(tmp_path / "model")

    def write_as_well():
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "second").touch()
            process.communicate("go\n")

    with pytest.raises(ConfigurationError, match=r"Another process created .*model in the meantime"):
        write_as_well()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["a", "b"]


def test_what_another_machine_writes_is_left_alone(tmp_path):
    elsewhere = tmp_path / ".model.999999-1-00000000-0.partial"
    elsewhere.mkdir()
    with atomic_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == [elsewhere.name, "model"]


def test_a_process_with_a_reused_id_owns_nothing(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        pid, _, rest = folder.name.split(".")[2].split("-", 2)
    earlier = tmp_path / f".model.{pid}-1-{rest}.partial"
    earlier.mkdir()
    with atomic_folder(tmp_path / "model", replace=True):
        pass
    assert names(tmp_path) == ["model"]


def test_a_folder_that_was_set_aside_when_its_process_was_killed_comes_back(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from st_llmpool.utils.files import atomic_folder
rename = Path.rename
def killed_after(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed_after
with atomic_folder(Path(sys.argv[1]), replace=True):
    pass
"""
    target = tmp_path / "report"
    target.mkdir()
    (target / "old").touch()
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()

    def fail():
        with atomic_folder(target, replace=True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "report"]


def test_threads_that_replace_one_folder_and_one_file_leave_a_complete_one(tmp_path):
    def write(number):
        for _ in range(20):
            with atomic_folder(tmp_path / "folder", replace=True) as folder:
                for name in "ab":
                    (folder / name).write_text(str(number))
            write_atomically(tmp_path / "file", str(number) * 1000, durable=False)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "folder/a").read_text() == (tmp_path / "folder/b").read_text()
    assert len(set((tmp_path / "file").read_text())) == 1


def test_a_folder_can_be_read_by_whoever_may_read_its_neighbours(tmp_path):
    (tmp_path / "neighbour").mkdir()
    (tmp_path / "file").touch()
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").touch(mode=0o600)
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "neighbour").stat().st_mode
    assert (tmp_path / "model" / "weights").stat().st_mode == (tmp_path / "file").stat().st_mode


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path, start_writer):
    killed = start_writer(tmp_path / "a.txt", "atomic_file")
    killed.kill()
    killed.wait()
    for text in ("one", "two"):
        write_atomically(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text() == text
    assert names(tmp_path) == ["a.txt"]


def test_everything_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Otherwise a power failure may leave the new name with empty files."""
    synced, at_rename = [], []
    fsync, rename = os.fsync, os.rename

    def note(descriptor):
        synced.append(os.stat(descriptor).st_ino)
        fsync(descriptor)

    def renaming(source, target, **kwargs):
        at_rename.append(list(synced))
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", note)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming)
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_text("1")
        inodes = {path.stat().st_ino for path in (folder, folder / "deep", folder / "deep/weights")}
    write_atomically(tmp_path / "file", "1")
    assert inodes <= set(at_rename[0])
    assert (tmp_path / "file").stat().st_ino in at_rename[1]
    assert synced.count(tmp_path.stat().st_ino) == 2  # the new names, after each rename


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("kind", ["system", "library"])
def test_a_disk_that_takes_no_more_gives_one_line_and_leaves_what_was_there(tmp_path, number, kind):
    write_atomically(tmp_path / "a.txt", "earlier")

    def fail():
        raise (
            OSError(number, os.strerror(number))
            if kind == "system"
            else RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        )

    with (
        pytest.raises(WriteError, match=rf"a\.txt cannot be written: {os.strerror(number)}"),
        atomic_file(tmp_path / "a.txt"),
    ):
        fail()
    with pytest.raises(WriteError, match=r"model cannot be written"), atomic_folder(tmp_path / "model"):
        fail()
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "earlier"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    for manager in (atomic_file, atomic_folder):
        with pytest.raises(WriteError, match="cannot be written: Permission denied"), manager(tmp_path / "a"):
            pass


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "data.jsonl"), ValueError("wrong")])
def test_other_errors_stay_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, reraise_as_write_error(tmp_path / "a"):
        raise error
    assert raised.value is error


def test_what_exists_is_refused_by_name(tmp_path):
    files.check_new_folder(tmp_path / "new")
    (tmp_path / "link").symlink_to("nowhere")
    for there in (tmp_path, tmp_path / "link"):
        with pytest.raises(ConfigurationError, match="exists; choose another folder"):
            files.check_new_folder(there)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("a file/x/y", "file is not a folder"),
        ("model/merged", "would lie in the saved model"),
        ("x" * 300, "is no name for"),
        ("zero\0byte", "is no name for"),
    ],
)
def test_a_folder_that_cannot_be_created_or_would_change_a_model_is_refused(tmp_path, place, reason):
    (tmp_path / "a file").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modules.json").touch()
    with pytest.raises(ConfigurationError, match=reason):
        files.check_new_folder(tmp_path / place)


def test_a_read_only_place_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(files.WriteError, match="is read-only"):
        files.check_new_folder(tmp_path / "new")


def test_a_slug_has_only_what_file_and_repository_names_can_hold():
    assert slug("a model / with: ümläut, v1.2 ") == "a-model-with-ümläut-v1.2"


HOLDER = """
import sys
from pathlib import Path
from st_llmpool.utils.files import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_by_name_and_may_enter_afterwards(tmp_path, holder):
    refusal = rf"run' is in use by process {holder.pid} on \S+ since \d.*Wait until it ends, or choose another folder"
    with pytest.raises(ConfigurationError, match=refusal), locked_folder(tmp_path / "run"):
        pass
    holder.communicate("go\n")
    with locked_folder(tmp_path / "run"):
        pass


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder, reaped):
    holder.kill()
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / "run" / ".lock").exists()
    started = time.monotonic()
    with locked_folder(tmp_path / "run"):
        assert time.monotonic() - started < 3
        with pytest.raises(ConfigurationError, match=f"process {os.getpid()}"), locked_folder(tmp_path / "run"):
            pass


def test_the_lock_of_another_machine_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("1\nelsewhere\n")
    refusal = r"in use by process 1 on elsewhere since .*If it has ended, delete \S+run/\.lock"
    with pytest.raises(ConfigurationError, match=refusal), locked_folder(tmp_path / "run"):
        pass
    (tmp_path / "run" / ".lock").unlink()
    with locked_folder(tmp_path / "run"):
        pass


def test_a_folder_into_which_nothing_was_put_is_gone_with_the_parents_that_were_made_for_it(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), locked_folder(tmp_path / "there" / "deep" / "run"):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with locked_folder(tmp_path / "there" / "deep" / "run"):
        (tmp_path / "there" / "deep" / "run" / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "file", "run", "there"]


def test_what_can_be_no_folder_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    reasons = {
        "file": "is a file",
        "link": "leads nowhere",
        "loop": "leads nowhere",
        "a\0b": "is no name",
        "x" * 300: "is no name",
    }
    for name, reason in reasons.items():
        with pytest.raises(ConfigurationError, match=reason), locked_folder(tmp_path / name):
            pass


def test_a_link_to_a_folder_is_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with locked_folder(tmp_path / "link"):
        assert (tmp_path / "folder" / ".lock").exists()
