"""The fixtures of the Hub tests: a Hub on loopback, a client in this process, and clients in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on loopback that this process's client speaks to as `alice`.

    The client reads its endpoint when it is imported, so it is set where the client keeps it.
    """
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"), raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        # transformers keeps one client for the life of the process: another test's would speak to a Hub that is gone.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        # Waiting between the client's own retries tests nothing.
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
        assert server.unknown == [], "the client has learned routes that the server does not speak"


# Answers each line of standard input, [code, arguments, folder, file for errors], with the exit code of a fork that ran
# the code: as a new interpreter that has imported sentence-transformers, and nothing of this package.
_FORKS = """
import json, os, sys, traceback
import sentence_transformers
for line in sys.stdin:
    code, arguments, folder, errors = json.loads(line)
    child = os.fork()
    if not child:
        sys.stderr, status = open(errors, "w"), 0
        os.chdir(folder)
        sys.argv = ["-c", *arguments]
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.close()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """`forks(command)` runs `python ... -c CODE ARGUMENTS` in a fork: an import of seconds is done once."""
    errors = tmp_path_factory.mktemp("forks") / "stderr"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-P", "-c", _FORKS], **pipes)

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        place = command.index("-c") + 1
        order = [command[place], command[place + 1 :], os.getcwd(), str(errors)]
        print(json.dumps(order), file=server.stdin, flush=True)
        return subprocess.CompletedProcess(command, int(server.stdout.readline()), "", errors.read_text())

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture
def forked_exports(forks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports compare vectors in a fork instead of a new interpreter."""
    monkeypatch.setattr("st_llmpool.hub.fresh_process.subprocess.run", forks)


@pytest.fixture
def elsewhere(hub: HubServer, tmp_path: Path) -> Callable[..., Any]:
    """`elsewhere(code, token=None)` runs `code` in a new process with an empty cache and returns its `answer`."""

    def run(code: str, token: str | None = None) -> Any:
        home = tmp_path / f"home-{len(list(tmp_path.iterdir()))}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        program = "import json\n" + textwrap.dedent(code) + "\nprint('\\n' + json.dumps(answer))\n"
        finished = subprocess.run(
            [sys.executable, "-c", program],
            env=kept | settings | ({"HF_TOKEN": token} if token else {}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        return json.loads(finished.stdout.strip().splitlines()[-1])

    return run
