"""The command line: help, exit codes, and errors without a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from st_llmpool import __version__, build_embedder
from st_llmpool.cli import app, main
from st_llmpool.evaluation import shipped_suites
from st_llmpool.hub.doctor import Diagnosis
from st_llmpool.hub.seal_checks import Finding
from st_llmpool.modules.errors import DataError
from st_llmpool.study.settings import presets

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_each_of_its_options(command):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"])
    assert result.exit_code == 0
    shown = words(result.output)
    known = typer.main.get_command(app).commands[command]
    assert words(known.help.split("\n\n")[0]) in shown
    for parameter in known.params:
        if parameter.name != "help":
            assert parameter.help, f"{command}: {parameter.name} is not explained"
            assert words(parameter.help) in shown
            assert parameter.param_type_name == "argument" or max(parameter.opts, key=len) in shown


def words(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s.,:;{}()'\"/<>*-]", " ", text).split())


@pytest.mark.parametrize(("command", "shipped"), [("study", presets), ("evaluate", shipped_suites)])
def test_help_lists_what_is_shipped(command, shipped):
    output = words(CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).output)
    assert ", ".join(sorted(shipped())) in output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from st_llmpool.cli import app; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version_is_printed():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == __version__


def test_doctor_prints_its_table_and_exits_with_zero(tiny_llm, tmp_path):
    build_embedder(tiny_llm).save_pretrained(str(tmp_path))
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "bidirectional" in result.output


def test_doctor_exits_with_one_on_a_damaged_model(tiny_llm, tmp_path):
    build_embedder(tiny_llm).save_pretrained(str(tmp_path))
    (tmp_path / "llm_transformer.py").unlink()
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    assert "llm_transformer.py" in result.output


def test_layers_prints_draws_and_writes_what_it_finds(tiny_llm, tmp_path):
    build_embedder(tiny_llm).save_pretrained(str(tmp_path / "model"))
    files = [tmp_path / "layers.json", tmp_path / "layers.png"]
    options = ["--json", str(files[0]), "--plot", str(files[1]), "--trust-remote-code"]
    result = CliRunner().invoke(app, ["layers", str(tmp_path / "model"), *options])
    assert result.exit_code == 0, result.output
    assert "Each layer" in result.output
    found = json.loads(files[0].read_text())
    assert len(found["after"]["cka"]) == len(found["attention"]) == 4
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_our_errors_are_one_message_without_a_traceback(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modell: x\n")
    monkeypatch.setattr(sys, "argv", ["st-llmpool", "train", str(recipe)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert "ConfigurationError" in printed
    assert "Traceback" not in printed


def run_main(monkeypatch, capsys, *arguments):
    """Exit code and what the command line prints on standard error, as a user sees it."""
    monkeypatch.setattr(sys, "argv", ["st-llmpool", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err.strip()


class ForeignError(ValueError):
    """As of a model's own copy of our code: its classes are not the package's."""

    is_st_llmpool_error = True


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ForeignError("two\nlines"), "ForeignError: two lines"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model"), "No space left on device: out/model"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (OSError("no file named config.json\nin x"), "OSError: no file named config.json in x"),
        (ConnectionError("Name or service\nnot known"), "ConnectionError: Name or service not known"),
        (DataError("a \x1b[2Jb"), "DataError: a [2Jb"),
        (
            ModuleNotFoundError("No module named 'scikit_posthocs'", name="scikit_posthocs"),
            'MissingExtraError: This needs scikit_posthocs: pip install "st-llmpool[plots]"',
        ),
        (ModuleNotFoundError("x: pip install 'st_llmpool[eval]'"), "x: pip install 'st_llmpool[eval]'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, error, line):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("st_llmpool.hub.doctor.doctor", fail)
    assert run_main(monkeypatch, capsys, "doctor", "x") == (1, line)


@pytest.mark.parametrize("command", [["layers", "x", "--texts"], ["submission", "x", "--out", "y", "--citation"]])
def test_a_text_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys, command):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {"latin": "is not UTF-8", "pipe": "is a pipe or device"}.items():
        code, line = run_main(monkeypatch, capsys, *command, tmp_path / name)
        assert (code, "\n" in line) == (1, False)
        assert line.startswith("DataError")
        assert reason in line


def test_a_plot_without_the_library_that_draws_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = 'MissingExtraError: --plot needs matplotlib: pip install "st-llmpool[plots]"'
    assert run_main(monkeypatch, capsys, "layers", "x", "--plot", "x.png") == (1, line)


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(monkeypatch, capsys):
    finding = Finding("prompts", "failed", "query: \x1b]0;title\x07\x9b2Jsearch")
    monkeypatch.setattr("st_llmpool.hub.doctor.doctor", lambda *args, **kwargs: Diagnosis("x", (finding,)))
    monkeypatch.setattr(sys, "argv", ["st-llmpool", "doctor", "x"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    assert "query: ]0;title2Jsearch" in printed
    assert not {"\x1b", "\x07", "\x9b"} & set(printed)


def test_what_is_ours_to_mend_keeps_its_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr("st_llmpool.hub.doctor.doctor", fail)
    monkeypatch.setattr(sys, "argv", ["st-llmpool", "doctor", "x"])
    with pytest.raises(TypeError, match="a bug"):
        main()


def test_commands_print_no_progress_of_quick_work_and_nothing_that_no_user_can_act_on(tiny_llm, tmp_path):
    build_embedder(tiny_llm, verify=False).save_pretrained(str(tmp_path / "model"))
    code = (
        "import logging, warnings; from st_llmpool.cli import app\n"
        f"app(['card', {str(tmp_path / 'model')!r}], standalone_mode=False)\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load CPU gemm_4bit_forward')\n"
        "warnings.warn('Setting `save_embedding_layers` to `True` as embedding layers found')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == ""


def test_help_groups_the_commands(capsys):
    text = CliRunner().invoke(app, ["--help"]).output
    panels = [text.index(title) for title in ("Build and train", "Evaluate", "Share")]
    assert panels == sorted(panels)
    assert all(command.rich_help_panel for command in app.registered_commands)
    assert panels[0] < text.index(" train ") < panels[1] < text.index(" compare ") < panels[2] < text.index(" push ")


@pytest.mark.parametrize(
    ("checkpoint", "line"),
    [
        (True, "Interrupted. The same command with --resume goes on from the last checkpoint."),
        (False, "Interrupted. No checkpoint was written yet: start again with the same command."),
    ],
)
@pytest.mark.parametrize("command", ["train", "adapt"])
def test_ctrl_c_in_a_training_is_one_line_that_says_how_to_go_on(
    monkeypatch, capsys, tmp_path, tiny_llm, command, checkpoint, line
):
    def interrupted(recipe, **options):
        if checkpoint:
            (tmp_path / "run/stages/1-mntp/checkpoints/checkpoint-2").mkdir(parents=True)
            (tmp_path / "run/stages/1-mntp/checkpoints/checkpoint-2/trainer_state.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(f"st_llmpool.training.{command}", interrupted)
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}/run\nmodel: {{base: {tiny_llm}}}\ndata: [{{source: p.jsonl}}]\n"
    )
    given = (
        [tmp_path / "recipe.yaml"] if command == "train" else [tiny_llm, "--data", "t.txt", "--out", tmp_path / "run"]
    )
    assert run_main(monkeypatch, capsys, command, *given) == (130, line)


@pytest.mark.parametrize("base", ["Qwen/Qwen3-0.6B", "a folder"])
def test_train_ends_with_where_the_model_is_and_what_to_do_with_it(base, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    base = str(tmp_path) if base == "a folder" else base
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "recipe.yaml").write_text(
        f"output_dir: {tmp_path}\nmodel: {{base: builtin}}\ndata: [{{source: docstrings}}]"
    )
    result = SimpleNamespace(model_dir=tmp_path / "model", report={"steps": 1})
    monkeypatch.setattr("st_llmpool.training.train", lambda recipe, resume: result)
    printed = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")]).output
    assert f"st-llmpool doctor {tmp_path / 'model'}\n" in printed
    assert ("Merge it before you share it" in printed) == (base == str(tmp_path))
