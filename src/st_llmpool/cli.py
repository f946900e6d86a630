"""The command line. Heavy imports are inside the commands, so that ``--help`` stays fast."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .modules.errors import __version__
from .utils.words import printable

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="st-llmpool",
    help="Turn a decoder LLM into a text-embedding model: build, train, evaluate, share.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


_BUILD, _EVALUATE, _SHARE = "Build and train", "Evaluate", "Share"
_BAR_DELAY = 5  # seconds before a progress bar of a library appears
#: Libraries whose errors are about the network.
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
    """Return the names of the YAML files in a folder of the package."""
    return ", ".join(sorted(file.stem for file in (Path(__file__).parent / folder).glob("*.yaml")))


def _option(text: str, *names: str, **settings: Any) -> Any:
    """Return an option with its help text."""
    return typer.Option(*names, help=text, **settings)


_Model = Annotated[str, typer.Argument(help="Folder or Hub id of a model.", metavar="MODEL")]
_SavedModel = Annotated[
    Path, typer.Argument(help="Folder of a saved model.", metavar="MODEL", exists=True, file_okay=False)
]
_Recipe = Annotated[Path, typer.Argument(help="YAML file.", metavar="RECIPE", exists=True, dir_okay=False)]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, such as training.learning_rate=1e-4.", metavar="[KEY=VALUE]..."),
]
_NewFolder = Annotated[Path, _option("Output folder, which must not exist yet.")]
_SuiteData = Annotated[Path | None, _option("Folder of the suite's data sets.")]
_BatchSize = Annotated[int, _option("Batch size.", min=1)]
_Resume = Annotated[bool, _option("Continue from the last checkpoint of this run.", "--resume")]
_JsonFile = Annotated[Path | None, _option("JSON file for all numbers.", "--json")]
_TrustRemoteCode = Annotated[
    bool, _option("Run code of the model that is not st_llmpool's own.", "--trust-remote-code")
]


def main() -> None:
    """Run the command line; an error that the user can fix is one line on standard error, with exit code 1."""
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
    """Return the line to print for an error that the user can fix; None for a bug of ours."""
    from .utils.extras import missing_extra

    error = missing_extra(error) or error
    words = printable(" ".join(str(error).split()))
    if getattr(error, "is_st_llmpool_error", False):  # also from a shared model's own copy of our code
        return f"{type(error).__name__}: {words}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK:
        return f"{type(error).__name__}: {words[:500]}"
    return words if isinstance(error, ImportError) and "pip install" in words else None


def _console() -> Console:
    """Return the console for a command's output; call it once the command's libraries are imported.

    Progress bars of loading and saving then appear only after some seconds.
    """
    from rich.console import Console
    from rich.segment import Segment

    bars: Any = sys.modules.get("transformers.utils.logging")
    if hasattr(bars, "set_tqdm_hook"):  # not in transformers 5.11
        bars.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{"delay": _BAR_DELAY, **kwargs}))

    class Printable(Console):
        """A model or result file may hold escape sequences, which would run in the user's terminal."""

        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for text, style, control in super().render(*args, **kwargs):
                yield Segment(text if control else printable(text), style, control)

    return Printable()


def _say(line: str) -> None:
    typer.echo(printable(line))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, _option("Print the version and exit.", "--version", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    # No user can act on it: peft saves embeddings that are trained.
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft reads it


@app.command(rich_help_panel=_BUILD)
def quickstart(
    out: Annotated[Path, _option("Output folder for the model and its results.")] = Path("runs/quickstart"),
) -> None:
    """Train the built-in backbone on this machine's docstrings, offline, and search with the result.

    Shows the ranking quality on packages that training never saw, before and after, next to BM25.
    """
    from .quickstart import quickstart as run

    run(out, console=_console())


@app.command(rich_help_panel=_BUILD)
def train(recipe: _Recipe, overrides: _Overrides = None, resume: _Resume = False) -> None:
    """Train an embedding model from RECIPE. On several processes: accelerate launch -m st_llmpool train RECIPE."""
    from .training import Recipe
    from .training import train as run

    _console()
    chosen = Recipe.from_yaml(recipe, overrides=overrides or [])
    with _resumable(Path(chosen.output_dir)):
        result = run(chosen, resume=resume)
    if result.report:  # on the first process
        typer.echo(_next_steps(result.model_dir))


def _next_steps(model: Path) -> str:
    """Return where a trained model is and what to do with it."""
    from .hub.export import adapter_base

    lines = [
        f"Model: {model}, with its card; the loss curve and the report are in {model.parent}. Next:",
        f"  st-llmpool evaluate {model} --out {model.parent / 'results'}",
        f"  st-llmpool doctor {model}",
        f"  st-llmpool push {model} you/model",
    ]
    base = adapter_base(model)
    if base is not None and Path(base).is_dir():
        merged = model.parent / "merged"
        lines[-1:] = [
            "  It is an adapter of a base in a local folder, which others do not have. Merge it before you share it:",
            f"  st-llmpool export {model} --out {merged} --merge && st-llmpool push {merged} you/model",
        ]
    return "\n".join(lines)


@app.command("batch-size", rich_help_panel=_BUILD)
def batch_size(
    recipe: _Recipe,
    overrides: _Overrides = None,
    memory: Annotated[
        float | None, _option("Memory limit in GiB; by default the free memory of the GPU or of this machine.")
    ] = None,
    at_most: Annotated[int, _option("Largest batch size to try.", min=2)] = 4096,
) -> None:
    """Find the largest batch size of RECIPE that fits in memory, with two training steps per trial."""
    from .tools.batch_size import batch_table, free_memory, largest_batch
    from .training import Recipe

    console, memory = _console(), free_memory() if memory is None else memory
    chosen = Recipe.from_yaml(recipe, overrides=overrides or [])
    with console.status("Trying ...") as status:
        trials = largest_batch(
            chosen, memory, at_most=at_most, on_trial=lambda trial: status.update(f"{trial.describe()}. Trying ...")
        )
    best = max(trial.batch_size for trial in trials if trial.fits)
    console.print(batch_table(trials, memory))
    typer.echo(f"training.batch_size={best}{' (the largest size tried)' if best == at_most else ''}")
    if chosen.loss.mini_batch_size is None:
        typer.echo("Gradient caching (loss.mini_batch_size) allows larger batches.")


@app.command(rich_help_panel=_BUILD)
def adapt(
    base: Annotated[
        str, typer.Argument(help="Folder or Hub id of a causal language model, or builtin.", metavar="BASE")
    ],
    data: Annotated[
        list[str], _option("Texts: a Parquet, JSONL, CSV or TXT file, a Hub dataset, or docstrings; may be repeated.")
    ],
    out: Annotated[Path, _option("Output folder; the adapted base is in its subfolder model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Other settings of an AdaptRecipe, such as max_seq_length=128.", metavar="[KEY=VALUE]..."),
    ] = None,
    column: Annotated[str, _option("Column of the texts.")] = "text",
    attention: Annotated[str, _option("bidirectional or causal.")] = "bidirectional",
    max_steps: Annotated[int | None, _option("Optimizer steps; one pass over the data by default.")] = None,
    batch_size: _BatchSize = 64,
    learning_rate: Annotated[float | None, _option("By default 2e-4 for an adapter, 2e-5 for the full model.")] = None,
    mlm_probability: Annotated[float, _option("Fraction of tokens to mask.")] = 0.2,
    tune: Annotated[str, _option("lora (merged at the end) or full.")] = "lora",
    merge: Annotated[
        list[float] | None,
        _option("Interpolation weight of the trained model against the base, 0 to 1; the best one if repeated."),
    ] = None,
    resume: _Resume = False,
) -> None:
    """Adapt BASE with masked next-token prediction and report the gain."""
    from .training import AdaptRecipe
    from .training import adapt as run
    from .training.mntp.masked_next_token import accuracy_table

    values = {
        "output_dir": str(out),
        "base": base,
        "texts": [{"source": source, "column": column} for source in data],
        "attention": attention,
        "masking": {"mlm_probability": mlm_probability},
        "tune": tune,
        "merge": merge[0] if merge and len(merge) == 1 else merge,
        "training": {"max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate},
    }
    console = _console()
    chosen = AdaptRecipe.from_dict(values, overrides or [])
    with _resumable(Path(chosen.output_dir)):
        result = run(chosen, resume=resume)
    if result.report:
        console.print(accuracy_table(result.report))
    typer.echo(f"Written: {result.model_dir}")


@app.command(rich_help_panel=_EVALUATE)
def evaluate(
    model: _Model,
    out: Annotated[
        Path | None, _option("Output folder for mteb's result files and the scores; runs/results/<MODEL> by default.")
    ] = None,
    suite: Annotated[
        str | None, _option(f"{_shipped('evaluation/suites')}, or a YAML file; builtin without a benchmark or task.")
    ] = None,
    data: _SuiteData = None,
    benchmark: Annotated[str | None, _option('An mteb benchmark, such as "MTEB(eng, v2)".')] = None,
    task: Annotated[list[str] | None, _option("Name of an mteb task; may be repeated.")] = None,
    limit: Annotated[
        int | None, _option("Largest number of rows, queries or documents per task of the suite.", min=1)
    ] = None,
    instruct: Annotated[
        str | None, _option('Template for the suite\'s instructions, such as "Instruct: {}; Query: "; none by default.')
    ] = None,
    allow_missing: Annotated[bool, _option("Leave out tasks of the suite that have no data.")] = False,
    batch_size: _BatchSize = 32,
    cache: Annotated[Path | None, _option("Folder for layer summaries, which poolings on one backbone share.")] = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Evaluate MODEL with mteb: a local suite (no network), a benchmark, or single tasks."""
    from .evaluation.suite import read_suite
    from .utils.files import check_model_path, slug

    check_model_path(model)  # before imports that take seconds
    out = out or Path("runs", "results", slug(model))
    read_suite(suite or "builtin")
    from .evaluation import evaluate as run

    console = _console()
    result = run(
        model,
        suite=suite,
        data_dir=data,
        benchmark=benchmark,
        tasks=task,
        limit=limit,
        instruct=instruct,
        allow_missing=allow_missing,
        output_dir=out,
        batch_size=batch_size,
        cache=cache,
        trust_remote_code=trust_remote_code,
    )
    console.print(result.to_rich())
    _say(f"Written: {out}")


@app.command(rich_help_panel=_EVALUATE)
def study(
    study_file: Annotated[
        str, typer.Argument(help=f"YAML file, or a preset: {_shipped('study/presets')}.", metavar="STUDY")
    ],
    out: Annotated[Path | None, _option("Output folder for results and report; runs/<study> by default.")] = None,
    data: Annotated[Path | None, _option("Folder that replaces {data} in the study.")] = None,
    base: Annotated[
        list[str] | None, _option("NAME=FOLDER of a base that is on this machine; may be repeated.")
    ] = None,
    work: Annotated[
        Path | None, _option("Folder for checkpoints and models; work in the output folder by default.")
    ] = None,
    jobs: Annotated[int, _option("Number of parallel runs.", min=1)] = 1,
    reuse_from: Annotated[
        list[Path] | None,
        _option(
            "Output folder or results.parquet of a study whose identical runs are reused; may be repeated.",
            "--take-from",
        ),
    ] = None,
    dry_run: Annotated[bool, _option("Print runs, cost and statistical power, and exit.", "--dry-run")] = False,
    report_only: Annotated[bool, _option("Report on the finished runs only.", "--report")] = False,
) -> None:
    """Train and evaluate several designs under equal conditions, and report paired tests. Resumes when run again.

    Several machines may share one output folder, as may the processes of: accelerate launch -m st_llmpool study STUDY.
    """
    from .study.settings import Study
    from .utils.extras import needs

    plan = Study.load(study_file)  # before imports that take seconds
    folders = dict(part.partition("=")[::2] for part in base or ())
    plan = replace(plan, base_folders={**plan.base_folders, **folders})
    with needs("eval", "A study"):
        from .study.forecast import forecast
        from .study.runner import StudyRunner

    folder = out or Path("runs") / plan.name
    runner = StudyRunner(
        plan, folder, work=work, data_dir=data, jobs=jobs, reuse_from=reuse_from or (), report_only=report_only
    )
    console = _console()
    if int(os.environ.get("RANK", 0)) == 0 and not report_only:
        console.print(forecast(plan, runner.finished, data_dir=data).to_rich())
    if dry_run:
        return
    if not report_only:
        runner.run()
    if int(os.environ.get("RANK", 0)) == 0:
        if not report_only:
            runner.measure()
        typer.echo(f"Written: {runner.report()}")


@app.command(rich_help_panel=_EVALUATE)
def compare(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Folder of mteb's results, or a .csv or .parquet file with task, task_type, model, score. "
            "NAME=PATH renames its model.",
            metavar="PATH",
        ),
    ],
    contrast: Annotated[
        list[str] | None, _option("A pre-registered comparison A:B, up to six; all other pairs are exploratory.")
    ] = None,
    model: Annotated[list[str] | None, _option("Compare only this model; may be repeated.")] = None,
    metric: Annotated[str, _option("Score to compare, such as ndcg_at_10.")] = "main_score",
    rope: Annotated[float, _option("Largest difference that does not matter; such designs are equivalent.")] = 0.01,
    allow_mixed_revisions: Annotated[
        bool,
        _option(
            "Allow scores of different dataset revisions or mteb versions; a note names them.",
            "--allow-mixed-revisions",
        ),
    ] = False,
    task_types: Annotated[
        Path | None, _option("YAML with the types of tasks unknown to mteb: a suite file, or TASK: TYPE lines.")
    ] = None,
    json_file: _JsonFile = None,
    out: Annotated[Path | None, _option("Output folder for tables (CSV, Markdown) and figures (PNG).")] = None,
) -> None:
    """Compare models on mteb results: better, equivalent or undecided, over corpora, corrected, with the power."""
    from .stats import read_results, read_task_types

    types = read_task_types(task_types) if task_types else None
    results = read_results(paths, task_types=types, models=model)  # before imports that take seconds
    from .stats import compare as run
    from .stats.tables import to_json, to_rich, write
    from .utils.files import write_atomically

    comparison = run(results, contrast or (), metric=metric, rope=rope, allow_mixed_revisions=allow_mixed_revisions)
    _console().print(to_rich(comparison))
    if json_file:
        write_atomically(json_file, to_json(comparison))
    written = [json_file] if json_file else []
    if out:
        written += write(comparison, out)
    for path in written:
        typer.echo(f"Written: {path}")


@app.command(rich_help_panel=_BUILD)
def select(
    pool: Annotated[
        list[str], typer.Argument(help="Parquet, JSONL, CSV or TSV file, folder or Hub dataset.", metavar="POOL...")
    ],
    target: Annotated[str, _option("Dataset to be similar to, given as POOL.", metavar="SET")],
    k: Annotated[int, _option("Number of rows to select.", "--k", min=1)],
    out: Annotated[
        Path | None,
        _option(
            "A new .parquet file, with a report in a .json file of the same name; by default "
            "<POOL>_selected.parquet, after the first POOL.",
            metavar="FILE",
        ),
    ] = None,
    model: Annotated[str, _option("Folder or Hub id of the model that embeds the rows, or builtin.")] = "builtin",
    column: Annotated[
        list[str] | None, _option("Text column of POOL; may be repeated; text or query by default.")
    ] = None,
    target_column: Annotated[
        list[str] | None, _option("Text column of SET; may be repeated; as for POOL by default.")
    ] = None,
    by: Annotated[str | None, _option("Column of POOL by which the selected rows are counted too.")] = None,
    max_length: Annotated[int, _option("Maximum length of a text in tokens.", min=1)] = 512,
    batch_size: _BatchSize = 32,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Select the K rows of POOL that are most similar to the rows of SET."""
    from .tools.select import select as run

    console = _console()
    out = out or Path(f"{Path(pool[0]).absolute().stem}_selected.parquet")
    selection = run(
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
    console.print(selection.to_rich())
    typer.echo(f"Written: {out} and {out.with_suffix('.json')}")


@app.command(rich_help_panel=_SHARE)
def doctor(
    model: _Model,
    trust_remote_code: _TrustRemoteCode = False,
    seal: Annotated[bool, _option("Seal the folder's current files if all other checks pass.", "--seal")] = False,
) -> None:
    """Check MODEL: seal, measured attention, EOS, padding, weights. Exit code 1 if a check fails.

    Exit code 3 if MODEL was not loaded because it needs code that is not st_llmpool's own.
    """
    from .hub.doctor import doctor as run

    console = _console()
    diagnosis = run(model, trust_remote_code=trust_remote_code, seal=seal)
    console.print(diagnosis.to_rich())
    raise typer.Exit(1 if diagnosis.failed else 0 if diagnosis.complete else 3)


@app.command(rich_help_panel=_EVALUATE)
def layers(
    model: _Model,
    texts: Annotated[Path | None, _option("Text file with one text per line; a few built-in texts by default.")] = None,
    plot: Annotated[Path | None, _option("PNG file for the figure.")] = None,
    json_file: _JsonFile = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Score each layer of MODEL alone, compare the layers, and show which ones the pooling uses."""
    import json

    from .utils.extras import require
    from .utils.files import check_model_path, write_atomically
    from .utils.reading import read_lines

    check_model_path(model)  # before imports that take seconds
    if plot is not None:
        require("plots", "matplotlib", purpose="--plot")
    from .analysis.layers import analyze_layers
    from .hub.loading import load_model
    from .model_card.figures import draw_layers

    console = _console()
    lines = None if texts is None else [line for line in read_lines(texts) if line]
    report = analyze_layers(None, load_model(model, trust_remote_code=trust_remote_code), lines)
    console.print(report.to_rich())
    if json_file is not None:
        write_atomically(json_file, json.dumps(report.to_dict(), indent=1))
        typer.echo(f"Written: {json_file}")
    if plot is not None and draw_layers(plot, report.to_dict()):
        typer.echo(f"Written: {plot}")


@app.command(rich_help_panel=_SHARE)
def card(
    model: _SavedModel,
    results: Annotated[Path | None, _option("Output folder of st-llmpool evaluate.")] = None,
    run: Annotated[Path | None, _option("Folder of the training run; by default the parent of MODEL.")] = None,
    model_id: Annotated[str | None, _option("Hub id that the model will have.")] = None,
    license: Annotated[str | None, _option("Licence of the model, such as apache-2.0.")] = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Regenerate the model card of MODEL: design, attention, cost, layer use, training, results."""
    from .model_card.card import read_results, write_card

    _console()
    file = write_card(
        model,
        run=run,
        results=[] if results is None else read_results(results),
        model_id=model_id,
        license=license,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(f"Written: {file}")


@app.command(rich_help_panel=_SHARE)
def export(
    model: _SavedModel,
    out: _NewFolder,
    native: Annotated[
        bool,
        _option(
            "Use only sentence-transformers' own modules, which load without a flag; refused if vectors differ.",
            "--native",
        ),
    ] = False,
    merge: Annotated[bool, _option("Merge the adapter into the backbone.", "--merge")] = False,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Copy MODEL, merged or in native form, if a fresh process computes the same vectors from the copy."""
    from .hub.export import export as run

    _console()
    run(model, out, native=native, merge=merge, trust_remote_code=trust_remote_code)
    flag = "" if native else ", trust_remote_code=True"
    typer.echo(f'Written: SentenceTransformer("{out}"{flag})')


@app.command(rich_help_panel=_SHARE)
def push(
    model: _SavedModel,
    repo_id: Annotated[
        str | None, typer.Argument(help="user/name, or a name in your namespace; the folder's name by default.")
    ] = None,
    private: Annotated[bool, _option("Create the repository as private.", "--private")] = False,
    revision: Annotated[
        str | None, _option("Branch, created if it does not exist, or refs/pr/N; main by default.")
    ] = None,
    create_pr: Annotated[bool, _option("Open a pull request.", "--create-pr")] = False,
    merge: Annotated[bool, _option("Merge the adapter into the backbone first.", "--merge")] = False,
    native: Annotated[
        bool | None, _option("Form; by default native if the design has this form.", "--native/--portable")
    ] = None,
    no_check: Annotated[bool, _option("Push even if a check of the doctor fails.", "--no-check")] = False,
    message: Annotated[str | None, _option("Title of the commit or pull request.")] = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Check MODEL and upload it to the Hub in one commit, with the token of `hf auth login` or HF_TOKEN."""
    from .hub.push import push as run

    _console()
    pushed = run(
        model,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        native=native,
        merge=merge,
        check=not no_check,
        trust_remote_code=trust_remote_code,
        commit_message=message,
        progress=_say,
    )
    if pushed.removed:
        typer.echo(f"Deleted {len(pushed.removed)} files of an earlier push: {', '.join(pushed.removed)}")
    typer.echo(f"Pushed: {pushed.url}, commit {pushed.commit}\nLoad it: {pushed.how_to_load()}")


@app.command(rich_help_panel=_BUILD)
def soup(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of at least two models.", metavar="MODEL...")],
    out: _NewFolder,
    greedy: Annotated[
        str | None,
        _option("Keep only models that raise the score on a file of validation pairs or a suite (name or YAML)."),
    ] = None,
    data: _SuiteData = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Average the weights of several MODELs with one base: all of them, or greedily those that raise a score."""
    from .data.training_data import FORMATS, DatasetSettings
    from .tools.soup import soup as run

    is_pairs = greedy is not None and Path(greedy).suffix in FORMATS
    _console()
    made = run(
        models,
        out,
        validation=DatasetSettings(str(greedy)) if is_pairs else None,
        suite=None if is_pairs else greedy,
        data_dir=data,
        trust_remote_code=trust_remote_code,
    )
    for name, score in made.scores.items():
        typer.echo(f"{score:.4f}  {name}{'  (used)' if name in made.ingredients else ''}")
    if made.score is not None:
        typer.echo(f"{made.score:.4f}  average")
    typer.echo(f"Written: {made.model_dir}")


@app.command(rich_help_panel=_SHARE)
def submission(
    model: Annotated[str, typer.Argument(help="Hub id, or the folder that was pushed.", metavar="MODEL")],
    out: _NewFolder,
    results: Annotated[Path | None, _option("Output folder of st-llmpool evaluate; mteb's cache by default.")] = None,
    name: Annotated[str | None, _option("Hub id of MODEL if that is a folder.")] = None,
    revision: Annotated[str | None, _option("Commit on the Hub; by default the newest of a Hub id.")] = None,
    benchmark: Annotated[str, _option("Benchmark that the results should cover.")] = "MTEB(eng, v2)",
    license: Annotated[str | None, _option("Licence; the model card's by default.")] = None,
    language: Annotated[list[str] | None, _option("Language and script; may be repeated; eng-Latn by default.")] = None,
    training_dataset: Annotated[
        list[str] | None, _option("mteb task whose data were trained on; may be repeated; 'none' if none.")
    ] = None,
    training_code: Annotated[str | None, _option("URL of the training code.")] = None,
    training_data: Annotated[str | None, _option("URL of the training data.")] = None,
    adapted_from: Annotated[str | None, _option("Hub id of the base; the card's by default.")] = None,
    citation: Annotated[Path | None, _option("BibTeX file.", exists=True, dir_okay=False)] = None,
    contact: Annotated[list[str] | None, _option("GitHub name of a contact; may be repeated.")] = None,
    release_date: Annotated[str | None, _option("YYYY-MM-DD; today by default.")] = None,
    trust_remote_code: _TrustRemoteCode = False,
) -> None:
    """Write the files for a submission to the MTEB leaderboard: results, description, mock run, instructions."""
    from .hub.submission import Authorship
    from .hub.submission import submission as run
    from .utils.reading import read_text

    authorship = Authorship(
        license=license,
        languages=language or ("eng-Latn",),
        training_datasets=() if training_dataset == ["none"] else training_dataset,
        adapted_from=adapted_from,
        public_training_code=training_code,
        public_training_data=training_data,
        citation=read_text(citation) if citation else None,
        contacts=contact or (),
        release_date=release_date,
    )
    _console()
    folder = run(
        model,
        out,
        name=name,
        revision=revision,
        results=results,
        benchmark=benchmark,
        authorship=authorship,
        trust_remote_code=trust_remote_code,
        progress=_say,
    )
    typer.echo(f"Written: {folder}; see README.md there for missing results and the next steps")
