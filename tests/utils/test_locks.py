"""One process to a folder; the dead hold nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.utils.locks import locked_folder

HOLDER = """
import sys
from pathlib import Path
from st_llmpool.utils.locks import locked_folder
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
