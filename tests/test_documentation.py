"""The commands and code of README.md and docs/ run as written, in a folder that holds what they name, built small."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
import typer
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from st_llmpool import build_embedder
from st_llmpool.cli import app
from st_llmpool.evaluation import evaluate
from st_llmpool.evaluation import tasks as evaluation_tasks
from st_llmpool.training import Recipe, train
from tests.conftest import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
#: Generated tables aside. What the page on contributing says has a test of its own below.
PAGES = ["README.md", "CONTRIBUTING.md"] + [
    str(file.relative_to(ROOT))
    for file in sorted((ROOT / "docs").glob("*.md"))
    if file.name not in ("architectures.md", "sharing.md", "contributing.md")
]
BASE = "Qwen/Qwen3-0.6B"

#: Start of a command that does not run here -> why.
NOT_RUN = {
    "pip install": "needs a package index",
    "git clone": "needs a network",
    "make ": "makes an environment",
    "accelerate launch": "starts processes; tests/training/test_two_processes.py",
    "st-llmpool quickstart": "takes minutes; its parts have tests of their own",
    "st-llmpool batch-size": "starts a process for every size; the search has a test of its own",
    "st-llmpool push": "needs a Hub; tests/hub/test_push.py has one",
    "st-llmpool submission": "needs a Hub; tests/hub/test_submission.py has one",
    "st-llmpool study study.yaml --out": "takes minutes; tests/study/test_runner.py",
}
#: Start of a command -> what makes it small.
SMALL = {
    "st-llmpool train recipe.yaml": ["training.max_steps=2", "training.batch_size=8", "loss.mini_batch_size=4"],
    "st-llmpool train staged.yaml": [
        *(f"stages.{stage}.training.{small}" for stage in (0, 1) for small in ("max_steps=1", "batch_size=8")),
        *("training.max_steps=1", "training.batch_size=8"),
    ],
    "st-llmpool train frozen.yaml": ["training.max_steps=2", "training.batch_size=8"],
    "st-llmpool adapt": ["training.max_steps=2", "training.batch_size=4"],
}
#: The same within code and commands.
SMALLER = {"max_steps=100": "max_steps=2", "training.max_steps=500": "training.max_steps=2", "--k 10000": "--k 3"}
done: set[str] = set()


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """The code blocks of a page, in order, each with its language."""
    return re.findall(r"^```(\w+)\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL)


def commands(code: str) -> Iterator[str]:
    for line in code.splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


def write_rows(file: str, rows: list[dict[str, str]]) -> None:
    Path(file).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_results(folder: str, model: str, score: float) -> None:
    """Six results as mteb writes them."""
    for task in ("STS12", "STS13", "STS14", "STS15", "STS16", "STS17"):
        file = Path(folder) / model / ("0" * 40) / f"{task}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        scores = [{"hf_subset": "default", "languages": ["eng-Latn"], "main_score": score}]
        result = {"dataset_revision": "r", "task_name": task, "mteb_version": "2.0.0", "evaluation_time": 1.0}
        file.write_text(json.dumps(result | {"kg_co2_emissions": None, "scores": {"test": scores}}))


class Docstring:
    def __init__(self, number: int) -> None:
        self.query, self.positive, self.negative = f"query {number}", f"document {number}", "other"


def docstrings(split: str) -> list[Docstring]:
    """In place of those of a full environment, which take 45 seconds to parse."""
    return [Docstring(number) for number in range(20)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with what the pages name."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("documentation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokenizer = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(BASE)
        tokenizer.save_pretrained(BASE)
        pairs = [{"question": f"fox {row}?", "answer": f"the lazy dog {row}"} for row in range(80)]
        write_rows("pairs.jsonl", pairs)
        write_rows("held_out.jsonl", pairs[:8])
        Path("texts.txt").write_text("".join(f"the quick brown fox jumps over {row} dogs\n" for row in range(40)))
        texts = pd.DataFrame({"text": [f"text {row}" for row in range(6)]})
        texts.to_parquet("pool.parquet")
        texts[:2].to_parquet("task.parquet")
        Path("data/manuals").mkdir(parents=True)
        write_rows("data/manuals/corpus.jsonl", [{"_id": str(row), "text": f"page {row}"} for row in range(4)])
        write_rows("data/manuals/queries.jsonl", [{"_id": "q", "text": "which page?"}])
        write_rows("data/manuals/qrels.jsonl", [{"query-id": "q", "corpus-id": "2"}])
        (study,) = (code for language, code in blocks("docs/study.md") if language == "yaml")
        Path("study.yaml").write_text(study, encoding="utf-8")
        (recipe,) = (code for language, code in blocks("README.md") if language == "yaml")
        train(Recipe.from_dict(yaml.safe_load(recipe), SMALL["st-llmpool train recipe.yaml"]))
        build_embedder(BASE, pooling="mean").save_pretrained("runs/mean/model")
        for name in ("you", "runs/a", "runs/b"):
            shutil.copytree("runs/mine/model", f"{name}/model")
        for score, name in ((0.5, "a"), (0.6, "b")):
            write_results(f"runs/{name}/results", f"org__{name}", score)
        patch.setattr(evaluation_tasks, "docstring_pairs", docstrings)
        for name, model in (("mine", "mine"), ("other", "mean")):
            evaluate(f"runs/{model}/model", output_dir=f"runs/{name}/results")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    if "st-llmpool train recipe.yaml" in read(page):
        shutil.rmtree(tmp_path / "runs/mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluation_tasks, "docstring_pairs", docstrings)
    names: dict[str, object] = {"__name__": "page"}
    for language, code in blocks(page):
        for long, short in SMALLER.items():
            code = code.replace(long, short)
        if language == "python":
            exec(compile(code, page, "exec"), names)
        elif language == "yaml":
            file = re.match(r"# (\S+\.yaml)\n", code)
            assert file, f"{page}: the first line of a recipe names its file, for the commands after it"
            Path(file[1]).write_text(code, encoding="utf-8")
        elif language == "bash":
            for command in commands(code):
                run(command)
        else:
            assert language in ("bibtex", "text"), f"{page}: nothing runs a block of {language}"


def run(command: str) -> None:
    if any(command.startswith(start) for start in NOT_RUN):
        return
    program, *words = shlex.split(command)
    assert program == "st-llmpool", f"{command}: run it here, or say in NOT_RUN why not"
    words += [word for start, small in SMALL.items() if command.startswith(start) for word in small]
    if words[0] == "export":
        if command in done:  # starts a fresh process, for seconds
            return
        done.add(command)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{command}: {result.exception!r}\n{result.output}"


@pytest.mark.parametrize("start", NOT_RUN)
def test_every_command_that_is_not_run_is_in_a_page(start):
    pages = [code for page in PAGES for language, code in blocks(page) if language == "bash"]
    assert any(command.startswith(start) for code in pages for command in commands(code))


@pytest.mark.parametrize("page", [*PAGES, "docs/contributing.md"])
def test_commands_options_and_fields_that_a_page_names_exist(page):
    group = typer.main.get_command(app)
    text = " ".join(read(page).split())
    for command in re.findall(r"st-llmpool ([a-z][^`\n]*)", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)):
        verb, *words = command.split()
        assert verb in group.commands, command
        known = {option for parameter in group.commands[verb].params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}, command
    recipe = Recipe.from_dict({"output_dir": "x", "model": {"base": "x"}, "data": [{"source": "x"}]})
    for section, name in re.findall(r"`(model|loss|training|evaluation)\.(?!json`|png`)(\w+)[:`]", text):
        assert hasattr(getattr(recipe, section), name), f"{section}.{name}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_to_files_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)\)", read(page))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 170


def test_a_pooling_that_is_added_as_the_page_says_passes_the_shared_matrix(tmp_path):
    """In a copy of the repository: the file, the two lines that register it, then the tests that cover it unasked."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "golden", "builtin"))
    for name in ("pyproject.toml", "constraints-lowest.txt"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "src" / "st_llmpool"
    (code,) = (code for language, code in blocks("docs/contributing.md") if language == "python")
    (package / "poolings" / "first_last_pooling.py").write_text(code, encoding="utf-8")
    for file, *lines in (text.splitlines() for language, text in blocks("docs/contributing.md") if language == "text"):
        target = tmp_path / file.removeprefix("# ")
        text = target.read_text(encoding="utf-8")
        for line in lines:
            # After the line of PoNet, the same in kind: an import or a registry line.
            shape = re.escape(line.strip()).replace(r"first_last", "ponet").replace("FirstLast", "PoNet")
            shape = re.sub(r"(?<=PoNetPooling,).*", ".*", shape)
            text, count = re.subn(rf"^( *){shape}\n", lambda found, line=line: f"{found[0]}{line}\n", text, flags=re.M)
            assert count == 1, f"{file}: {line}"
        target.write_text(text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(package.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    tests = ["tests/modules/test_pooling_matrix.py", "tests/test_package.py", "-k", "first_last or FirstLast"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.search(r"\d\d passed", result.stdout), result.stdout[-500:]
