"""The command line. Heavy imports are inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .modules.errors import __version__

app = typer.Typer(
    name="st-llmpool",
    help="Turn a decoder LLM into a text-embedding model: build, train, evaluate, share.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


_BUILD, _EVALUATE, _SHARE = "Build and train", "Evaluate", "Share"
#: What the libraries for the network raise.
_NETWORK = ("httpx2", "httpx", "httpcore2", "httpcore", "huggingface_hub", "requests", "urllib3")


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Answer Ctrl-C in a training by one line that says how to go on, and the exit code that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            again = "No checkpoint was written yet: start again with the same command."
            if any(folder.rglob("trainer_state.json")):
                again = "The same command with --resume goes on from the last checkpoint."
            typer.echo(f"Interrupted. {again}", err=True)
        raise typer.Exit(130) from None


def _shipped(folder: str) -> str:
    """Returns the names of the YAML files in a folder of the package."""
    return ", ".join(sorted(file.stem for file in (Path(__file__).parent / folder).glob("*.yaml")))


def main() -> None:
    """Run the command line; what a user can mend is one line on standard error and exit code 1, without a traceback."""
    try:
        app()
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text(message, "bold red"))
        raise SystemExit(1) from None


def _message(error: Exception) -> str | None:
    """Return the line to print for an error that a user can mend; None for one that is ours to mend."""
    words = " ".join(str(error).split())
    if getattr(error, "is_st_llmpool_error", False):  # also from a shared model's own copy of our code
        return f"{type(error).__name__}: {words}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK:
        return f"{type(error).__name__}: {words[:500]}"
    return words if isinstance(error, ImportError) and "pip install" in words else None


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    # What libraries print at import and at save that no user can act on: a kernel that is optional, and that peft saves
    # the embeddings that were trained.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")


@app.command(rich_help_panel=_BUILD)
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the model and its results.")] = Path("runs/quickstart"),
) -> None:
    """Train the built-in backbone on this machine's docstrings, offline, and search with the result.

    Shows the ranking quality on packages that training never saw, before and after, beside BM25.
    """
    from .quickstart import run

    run(out)


@app.command(rich_help_panel=_BUILD)
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file.", metavar="RECIPE", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the recipe, such as training.learning_rate=1e-4.", metavar="[KEY=VALUE]..."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")] = False,
) -> None:
    """Train an embedding model from RECIPE. On several processes: accelerate launch -m st_llmpool train RECIPE."""
    from .training import Recipe
    from .training import train as run

    chosen = Recipe.from_yaml(recipe, overrides=overrides or [])
    with _resumable(Path(chosen.output_dir)):
        run(chosen, resume=resume)


@app.command("batch-size", rich_help_panel=_BUILD)
def batch_size(
    recipe: Annotated[Path, typer.Argument(help="YAML file.", metavar="RECIPE", exists=True, dir_okay=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe, as for train.", metavar="[KEY=VALUE]...")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB to stay within; by default what is free on the GPU, or this machine.")
    ] = None,
    at_most: Annotated[int, typer.Option(help="The largest batch to try.", min=2)] = 4096,
) -> None:
    """Find the largest batch that RECIPE can train with in a given memory, by two trial steps of each size."""
    from rich.console import Console

    from .tools.batch_size import batch_table, free_memory, largest_batch
    from .training import Recipe

    console, memory = Console(), free_memory() if memory is None else memory
    chosen = Recipe.from_yaml(recipe, overrides=overrides or [])
    with console.status("Trying ...") as status:
        trials = largest_batch(
            chosen, memory, at_most=at_most, told=lambda trial: status.update(f"{trial.describe()}. Trying ...")
        )
    best = max(trial.batch_size for trial in trials if trial.fits)
    console.print(batch_table(trials, memory))
    bound = " (the largest that was tried)" if best == at_most else ""
    console.print(f"training.batch_size={best}{bound}", highlight=False)
    if chosen.loss.mini_batch_size is None:
        console.print("A larger one fits with loss.mini_batch_size, which caches gradients.")


@app.command(rich_help_panel=_BUILD)
def adapt(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model, or builtin.")],
    data: Annotated[
        list[str],
        typer.Option(help="Text: a parquet, JSONL, CSV or TXT file, a Hub dataset, or docstrings; may be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the run; the adapted base ends in model in it.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Any setting of an AdaptRecipe, such as max_seq_length=128.", metavar="[KEY=VALUE]..."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    attention: Annotated[str, typer.Option(help="bidirectional or causal.")] = "bidirectional",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; one pass over the data by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Batch size.")] = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="By default 2e-4 for an adapter, 2e-5 for the full model.")
    ] = None,
    mask_share: Annotated[float, typer.Option(help="Fraction of the tokens that are masked.")] = 0.2,
    tune: Annotated[str, typer.Option(help="What trains: lora (merged at the end) or full.")] = "lora",
    merge: Annotated[
        list[float] | None,
        typer.Option(
            help="Weight of the trained model in the result, 0 to 1 (the rest is the base); the best of several is used"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")] = False,
) -> None:
    """Adapt BASE with masked next-token prediction and report the gain."""
    from rich.console import Console

    from .training import AdaptRecipe
    from .training import adapt as run
    from .training.mntp.masked_accuracy import accuracy_table

    values = {
        "output_dir": str(out),
        "base": base,
        "texts": [{"source": source, "column": column} for source in data],
        "attention": attention,
        "masking": {"share": mask_share},
        "tune": tune,
        "merge": merge[0] if merge and len(merge) == 1 else merge,
        "training": {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate},
    }
    chosen = AdaptRecipe.from_dict(values, overrides or [])
    with _resumable(Path(chosen.output_dir)):
        result = run(chosen, resume=resume)
    console = Console()
    if result.report:
        console.print(accuracy_table(result.report))
    console.print(f"Written: {result.model_dir}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=_EVALUATE)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for mteb's result files and the table.")],
    suite: Annotated[
        str | None,
        typer.Option(help=f"{_shipped('evaluation/suites')}, or a YAML file; builtin if no benchmark is named."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that holds the suite's data sets.")] = None,
    benchmark: Annotated[str | None, typer.Option(help='An mteb benchmark, such as "MTEB(eng, v2)".')] = None,
    task: Annotated[list[str] | None, typer.Option(help="An mteb task by name; may be repeated.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="The most rows, queries or documents of each task of the suite.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Batch size.", min=1)] = 32,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with it.")
    ] = False,
) -> None:
    """Evaluate MODEL with mteb: a local suite (no network), a benchmark, or single tasks."""
    from rich.console import Console

    from .evaluation.suite import read_suite
    from .utils.files import check_model_path

    check_model_path(model)  # before imports that take seconds
    read_suite(suite or "builtin")
    from .evaluation import evaluate as run

    result = run(
        model,
        suite=suite,
        data_dir=data,
        benchmark=benchmark,
        tasks=task,
        limit=limit,
        output_dir=out,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    Console().print(result.to_rich())


@app.command(rich_help_panel=_EVALUATE)
def study(
    study_file: Annotated[
        str,
        typer.Argument(help=f"YAML file, or a preset: {_shipped('study/presets')}.", metavar="STUDY"),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for results and report; runs/<study> by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder to put in place of {data} in the study.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for checkpoints and models; OUT/work by default.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
    take_from: Annotated[
        list[Path] | None,
        typer.Option(help="Reuse identical runs of another study: its OUT or results.parquet; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print runs, cost and power, and stop.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report", help="Report on the finished runs, without new ones.")
    ] = False,
) -> None:
    """Train and evaluate several designs under equal conditions, and report paired tests. Resumes when run again.

    Several machines may work on one OUT; so may the processes of: accelerate launch -m st_llmpool study STUDY.
    """
    from rich.console import Console

    from .study.settings import Study

    plan = Study.load(study_file)  # before imports that take seconds
    from .study.forecast import forecast
    from .study.runner import StudyRunner

    folder = out or Path("runs") / plan.name
    runner = StudyRunner(
        plan, folder, work=work, data_dir=data, jobs=jobs, reuse_from=take_from or (), report_only=report_only
    )
    console = Console()
    if int(os.environ.get("RANK", 0)) == 0 and not report_only:
        console.print(forecast(plan, runner.records, data_dir=data).to_rich())
    if dry_run:
        return
    if not report_only:
        runner.run()
    if int(os.environ.get("RANK", 0)) == 0:
        if not report_only:
            runner.measure()
        console.print(f"Written: {runner.report()}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=_EVALUATE)
def compare(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Folder of mteb's results, or a .csv or .parquet with task, task_type, model, score. "
            "NAME=PATH names the model in it.",
            metavar="PATH",
        ),
    ],
    contrast: Annotated[
        list[str] | None,
        typer.Option(help="A pre-registered comparison A:B; up to six. All other pairs are exploratory."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Compare only this model; may be repeated.")] = None,
    metric: Annotated[str, typer.Option(help="The score to compare, such as ndcg_at_10.")] = "main_score",
    allow_mixed_revisions: Annotated[
        bool,
        typer.Option(
            "--allow-mixed-revisions",
            help="Compare scores of different dataset revisions or mteb versions all the same; a note names them.",
        ),
    ] = False,
    task_types: Annotated[
        Path | None,
        typer.Option(help="YAML that says the type of tasks mteb does not know: a suite file, or TASK: TYPE lines."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for every statistic.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the tables (CSV, Markdown) and pictures (PNG).")] = None,
) -> None:
    """Compare models on mteb results: paired tests over tasks, corrected for multiplicity, with their power."""
    from rich.console import Console

    from .stats import read_results, read_task_types

    types = read_task_types(task_types) if task_types else None
    results = read_results(paths, task_types=types, models=model)  # before imports that take seconds
    from .stats import compare as run
    from .stats.tables import to_json, to_rich, write

    comparison = run(results, contrast or (), metric=metric, allow_mixed_revisions=allow_mixed_revisions)
    console = Console()
    console.print(to_rich(comparison))
    if json_file:
        json_file.write_text(to_json(comparison), encoding="utf-8")
    written = [json_file] if json_file else []
    if out:
        written += write(comparison, out)
    for path in written:
        console.print(f"Written: {path}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=_BUILD)
def select(
    pool: Annotated[
        list[str], typer.Argument(help="Parquet, JSONL, CSV or TSV file, folder or Hub data set.", metavar="POOL...")
    ],
    target: Annotated[str, typer.Option(help="The rows to look like; a file as POOL.", metavar="SET")],
    k: Annotated[int, typer.Option("--k", help="How many rows to choose.", min=1)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new .parquet file; a note goes into .json beside it; <POOL>_selected.parquet by default, after the "
            "first POOL.",
            metavar="FILE",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Folder or Hub id; builtin is the small one here.")] = "builtin",
    column: Annotated[
        list[str] | None, typer.Option(help="Column of POOL with text; may be repeated; text or query by default.")
    ] = None,
    target_column: Annotated[list[str] | None, typer.Option(help="The same for SET; as for POOL by default.")] = None,
    by: Annotated[str | None, typer.Option(help="A column of POOL to count the chosen rows by, besides files.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a text that count.", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(help="Batch size.", min=1)] = 32,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with it.")
    ] = False,
) -> None:
    """Select the K rows of POOL that are most similar to the rows of SET."""
    from rich.console import Console

    from .tools.select import select_rows

    out = out or Path(f"{Path(pool[0]).absolute().stem}_selected.parquet")
    selection = select_rows(
        pool,
        target,
        k,
        out,
        model=model,
        columns=column or (),
        target_columns=target_column or (),
        by=by,
        max_length=max_length,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    console = Console()
    console.print(selection.to_rich())
    console.print(f"Written: {out} and {out.with_suffix('.json')}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=_SHARE)
def doctor(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.", metavar="MODEL")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with it.")
    ] = False,
    seal: Annotated[bool, typer.Option("--seal", help="Accept the folder's files as they are now.")] = False,
) -> None:
    """Check MODEL: seal, measured attention, EOS, padding, weights. Exit code 1 if a check fails.

    Exit code 3 if code that is not the installed st_llmpool's keeps MODEL from being loaded and checked.
    """
    from rich.console import Console

    from .hub.doctor import examine

    diagnosis = examine(model, trust_remote_code=trust_remote_code, seal=seal)
    Console().print(diagnosis.to_table())
    raise typer.Exit(1 if diagnosis.failed else 0 if diagnosis.examined else 3)


@app.command(rich_help_panel=_EVALUATE)
def layers(
    model: Annotated[str, typer.Argument(help="Folder or Hub id.", metavar="MODEL")],
    texts: Annotated[Path | None, typer.Option(help="A text file, one text a line; a few are built in.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG to draw.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for every figure.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with it.")
    ] = False,
) -> None:
    """Show what each layer of MODEL gives on its own, how similar the layers are, and which the pooling reads."""
    import json

    from rich.console import Console

    from .utils.files import check_model_path

    check_model_path(model)  # before imports that take seconds
    from .analysis.layers import analyze_layers
    from .hub.loading import load_model
    from .model_card.figures import draw_layers

    lines = None if texts is None else [line for line in texts.read_text(encoding="utf-8").splitlines() if line]
    report = analyze_layers(None, load_model(model, trust_remote_code=trust_remote_code), lines)
    Console().print(report.to_rich())
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
        Console().print(f"Written: {json_file}")
    if plot is not None and draw_layers(plot, report.to_dict()):
        Console().print(f"Drawn: {plot}")


@app.command(rich_help_panel=_SHARE)
def card(
    model: Annotated[Path, typer.Argument(help="A saved model.", metavar="DIR", exists=True, file_okay=False)],
    results: Annotated[Path | None, typer.Option(help="The --out folder of st-llmpool evaluate.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder; by default the one above DIR.")] = None,
    model_id: Annotated[str | None, typer.Option(help="The Hub id that it will have.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the model, such as apache-2.0.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with it.")
    ] = False,
) -> None:
    """Regenerate the model card of DIR: design, attention, cost, layer use, training, results."""
    from rich.console import Console

    from .model_card.card import read_results, write_card

    file = write_card(
        model,
        run=run,
        results=[] if results is None else read_results(results),
        model_id=model_id,
        license=license,
        trust_remote_code=trust_remote_code,
    )
    Console().print(f"Written: {file}")


@app.command(rich_help_panel=_SHARE)
def export(
    source: Annotated[Path, typer.Argument(help="A saved model.", metavar="DIR", exists=True, file_okay=False)],
    target: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", metavar="OUT")],
    native: Annotated[
        bool,
        typer.Option(
            "--native",
            help="Only sentence-transformers' own modules: loads with no flag; refused where that is not exact.",
        ),
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the backbone.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with it.")
    ] = False,
) -> None:
    """Copy DIR to OUT, merged or native, once a fresh process has given the same vectors."""
    from rich.console import Console

    from .hub.export import export as run

    run(source, target, native=native, merge=merge, trust_remote_code=trust_remote_code)
    flag = "" if native else ", trust_remote_code=True"
    Console().print(f'Written: SentenceTransformer("{target}"{flag})', highlight=False)


@app.command(rich_help_panel=_SHARE)
def push(
    model: Annotated[Path, typer.Argument(help="A saved model.", metavar="DIR", exists=True, file_okay=False)],
    repo_id: Annotated[
        str | None, typer.Argument(help="user/name, or a name of your own; the folder's name by default.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch, new or not, or refs/pr/N; main by default.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into the backbone first.")] = False,
    native: Annotated[
        bool | None, typer.Option("--native/--portable", help="Form; native where the design has it by default.")
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Push even if the doctor's checks fail.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit or pull request.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with it.")
    ] = False,
) -> None:
    """Check DIR and upload it to the Hub in one commit, with the token of `hf auth login` or HF_TOKEN."""
    from rich.console import Console

    from .hub.push import push as run

    console = Console(soft_wrap=True, highlight=False, markup=False)
    pushed = run(
        model,
        repo_id,
        private=private,
        revision=branch,
        create_pr=create_pr,
        native=native,
        merge=merge,
        check=not no_check,
        trust_remote_code=trust_remote_code,
        commit_message=message,
        tell=console.print,
    )
    if pushed.removed:
        console.print(f"Removed {len(pushed.removed)} files of an earlier model: {', '.join(pushed.removed)}")
    console.print(f"Pushed: {pushed.url}, commit {pushed.commit}\nLoad it: {pushed.how_to_load()}")


@app.command(rich_help_panel=_BUILD)
def soup(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids, two at least.", metavar="MODEL...")],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    greedy: Annotated[
        str | None,
        typer.Option(help="Keep only models that help: on a file of validation pairs, or on a suite (name or YAML)."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder that holds the suite's data sets.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with them.")
    ] = False,
) -> None:
    """Average the weights of MODELs trained from one base: all of them, or greedily those that help."""
    from rich.console import Console

    from .data.training_data import FORMATS, DatasetSettings
    from .tools.soup import soup as run

    is_pairs = greedy is not None and Path(greedy).suffix in FORMATS
    made = run(
        models,
        out,
        validation=DatasetSettings(str(greedy)) if is_pairs else None,
        suite=None if is_pairs else greedy,
        data_dir=data,
        trust_remote_code=trust_remote_code,
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for name, score in made.scores.items():
        console.print(f"{score:.4f}  {name}{'  taken' if name in made.ingredients else ''}")
    if made.score is not None:
        console.print(f"{made.score:.4f}  the soup")
    console.print(f"Written: {made.model_dir}")


@app.command(rich_help_panel=_SHARE)
def submission(
    model: Annotated[str, typer.Argument(help="Hub id, or the folder that was pushed.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    results: Annotated[Path | None, typer.Option(help="Of st-llmpool evaluate; mteb's cache by default.")] = None,
    name: Annotated[str | None, typer.Option(help="For a folder: its Hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit; for a Hub id the newest by default.")] = None,
    benchmark: Annotated[str, typer.Option(help="What the results should cover.")] = "MTEB(eng, v2)",
    license: Annotated[str | None, typer.Option(help="Licence; the model card's by default.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Such as eng-Latn, the default; may be repeated.")] = None,
    training_dataset: Annotated[
        list[str] | None, typer.Option(help="mteb task that the model was trained on; may be repeated; 'none' if none.")
    ] = None,
    training_code: Annotated[str | None, typer.Option(help="Where the training code is.")] = None,
    training_data: Annotated[str | None, typer.Option(help="Where the training data are.")] = None,
    adapted_from: Annotated[str | None, typer.Option(help="Hub id of the base; the card's by default.")] = None,
    citation: Annotated[Path | None, typer.Option(help="BibTeX file.", exists=True, dir_okay=False)] = None,
    contact: Annotated[list[str] | None, typer.Option(help="GitHub name to ask; may be repeated.")] = None,
    release_date: Annotated[str | None, typer.Option(help="YYYY-MM-DD; today by default.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with it.")
    ] = False,
) -> None:
    """Write what the MTEB leaderboard asks for: results, model description, mock run, instructions."""
    from rich.console import Console

    from .hub.submission import Authorship
    from .hub.submission import submission as run

    authorship = Authorship(
        license=license,
        languages=language or ("eng-Latn",),
        training_datasets=() if training_dataset == ["none"] else training_dataset,
        adapted_from=adapted_from,
        public_training_code=training_code,
        public_training_data=training_data,
        citation=citation.read_text(encoding="utf-8") if citation else None,
        contacts=contact or (),
        release_date=release_date,
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    folder = run(
        model,
        out,
        name=name,
        revision=revision,
        results=results,
        benchmark=benchmark,
        authorship=authorship,
        trust_remote_code=trust_remote_code,
        tell=console.print,
    )
    console.print(f"Written: {folder}; README.md there says what is missing and what to do")
