"""Write the files that a submission to the MTEB leaderboard needs, checked by mteb itself.

A submission is two pull requests: the `ModelMeta` to mteb, and the results to mteb's results repository. The
`ModelMeta` that mteb generates counts only the parameters of the file at the repository's root (not the pooling), names
a Hub model as its own base, and omits the flag that loading needs.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mteb
import torch
from huggingface_hub import HfApi, constants
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.model_meta import ScoringFunction
from mteb.results import TaskResult
from mteb.types import OutputDType
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import load_file_path

from ..evaluation.run import find_benchmark
from ..evaluation.tasks import MTEB_TASKS
from ..model_card.card import read_front_matter
from ..model_card.identity import fingerprint
from ..modules.errors import ConfigurationError, DataError, InputError, nearest
from ..utils.files import atomic_folder, check_new_folder
from ..utils.parameters import count_weights
from ..utils.random_state import preserve_rng_state
from .loading import load_model

_SOURCE = '''"""{name}: see {reference}."""

from __future__ import annotations

from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
{more}
{variable} = {meta}
'''


@dataclass(frozen=True)
class Authorship:
    """Facts about a model that only its authors know.

    Attributes:
        license: Licence of the weights, in mteb's spelling or as a URL; None takes the model card's.
        languages: Languages and scripts, such as `eng-Latn`.
        training_datasets: mteb tasks whose data the model was trained on, which the leaderboard does not count as
            zero-shot; empty if there are none, None if unknown.
        adapted_from: Hub id of the base; None takes the model card's.
        public_training_code: URL of the training code.
        public_training_data: URL of the training data.
        citation: BibTeX of the article, if there is one.
        contacts: GitHub names to ask.
        release_date: Day of the revision, `YYYY-MM-DD`; None is today.
    """

    license: str | None = None
    languages: Sequence[str] = ("eng-Latn",)
    training_datasets: Collection[str] | None = None
    adapted_from: str | None = None
    public_training_code: str | None = None
    public_training_data: str | None = None
    citation: str | None = None
    contacts: Sequence[str] = ()
    release_date: str | None = None

    def __post_init__(self) -> None:
        for name in self.training_datasets or ():
            if name not in MTEB_TASKS:
                raise ConfigurationError(
                    f"training_datasets: mteb has no task {name!r}.{nearest(name, MTEB_TASKS)} List only data "
                    f"of mteb tasks."
                )


@dataclass(frozen=True)
class _Result:
    """A result file that may be submitted."""

    path: Path
    task: str
    score: float


def submission(
    model: str | Path,
    output_dir: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    results: str | Path | None = None,
    benchmark: str = "MTEB(eng, v2)",
    authorship: Authorship | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    device: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write results, `model_meta.json`, the `ModelMeta` source file and mteb's mock run into a new folder.

    Args:
        model: Hub id, or the folder that was pushed as `name` at `revision`.
        output_dir: A folder that does not exist yet.
        name: For a folder: its Hub id, `user/name`.
        revision: Commit on the Hub; None is the newest one of a Hub id.
        results: Output folder of `st-llmpool evaluate`, or a cache of mteb; None is mteb's own cache. Results of a
            folder count if weights, tokenizer and prompts are the same.
        benchmark: The benchmark that the results should cover.
        authorship: Facts that only the authors know.
        trust_remote_code: Run code of the model that is not the installed package's.
        token: Hub token.
        device: Device to load the model on.
        progress: Called with one line of text at each step.

    Returns:
        `output_dir`.

    Raises:
        ConfigurationError: If names or settings contradict each other, or the model is private.
        DataError: If there are no results, or one is outdated, not finite or unreadable.
        InputError: If mteb's mock run fails.

    Example:
        >>> submission("me/my-embedder", "submission", results="results")  # doctest: +SKIP
        PosixPath('submission')
    """
    out = Path(output_dir)
    check_new_folder(out)
    authorship = authorship or Authorship()
    with preserve_rng_state(), atomic_folder(out) as folder:
        tasks = find_benchmark(benchmark).tasks
        name, revision = _published(str(model), name, revision, token)
        progress(f"Loading {model}")
        encoder = SentenceTransformerEncoderWrapper(
            load_model(
                model,
                revision=None if Path(model).is_dir() else revision,
                device=device,
                token=token,
                trust_remote_code=trust_remote_code,
            )
        )
        meta = model_meta(encoder.model, name, revision, authorship, card=_card(str(model), revision, token))
        found = _find_results(ResultCache(results), meta, fingerprint(encoder.model), progress)
        _copy_results(ResultCache(folder), meta, found)
        source = folder / "mteb" / "models" / "model_implementations" / f"{_variable(name)}.py"
        source.parent.mkdir(parents=True)
        source.write_text(meta_source(meta), encoding="utf-8")
        progress("Mock run of mteb on all task types")
        (folder / "mock_run.md").write_text(_mock_run(encoder, meta), encoding="utf-8")
        (folder / "README.md").write_text(_guide(meta, benchmark, tasks, found, source.relative_to(folder)), "utf-8")
    return out


def model_meta(
    model: SentenceTransformer, name: str, revision: str, authorship: Authorship, card: dict[str, Any] | None = None
) -> ModelMeta:
    """Return the description of a loaded model that mteb asks for.

    Args:
        model: The model, as loaded from `name` at `revision`.
        name: Hub id.
        revision: Commit.
        authorship: Facts that only the authors know.
        card: Front matter of the model card, for licence and base.

    Raises:
        ConfigurationError: If the licence is not known, or mteb refuses a value.

    Example:
        >>> from st_llmpool import build_embedder
        >>> from st_llmpool.data import builtin_backbone
        >>> model = build_embedder(builtin_backbone(), pooling="multi_layer", verify=False)
        >>> meta = model_meta(model, "me/mine", "0" * 40, Authorship(license="mit"))
        >>> meta.n_parameters == sum(parameter.numel() for parameter in model.parameters())
        True
    """
    card = card or {}
    license = authorship.license or card.get("license")
    if license is None:
        raise ConfigurationError(
            f"The licence of {name} is unknown, and the leaderboard asks for it. Set it (--license apache-2.0), or in "
            f"the front matter of the model card."
        )
    portable = any(not type(module).__module__.startswith("sentence_transformers.") for module in model)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    half = {torch.bfloat16: OutputDType.BF16, torch.float16: OutputDType.FLOAT16}.get(model.dtype)
    try:
        return ModelMeta(
            loader=SentenceTransformerEncoderWrapper,
            loader_kwargs={"trust_remote_code": True} if portable else {},
            name=name,
            revision=revision,
            release_date=authorship.release_date or datetime.now(UTC).date().isoformat(),
            languages=list(authorship.languages),
            n_parameters=count_weights(model.parameters()),
            n_embedding_parameters=_embedding_parameters(model),
            memory_usage_mb=round(size / 2**20, 1),
            max_tokens=model.max_seq_length,
            embed_dim=model.get_embedding_dimension(),
            license=license,
            open_weights=True,
            public_training_code=authorship.public_training_code,
            public_training_data=authorship.public_training_data,
            framework=["Sentence Transformers", "PyTorch", "safetensors"],
            reference=f"https://huggingface.co/{name}",
            similarity_fn_name=ScoringFunction.from_str(str(model.similarity_fn_name)),
            use_instructions=any(model.prompts.values()),
            training_datasets=None if authorship.training_datasets is None else set(authorship.training_datasets),
            adapted_from=authorship.adapted_from or _base_model(card, name),
            citation=authorship.citation,
            contacts=list(authorship.contacts) or None,
            output_dtypes=half,
        )
    except ValidationError as error:
        faults = {str(fault["loc"][0]): f"{fault['input']!r}: {fault['msg']}" for fault in reversed(error.errors())}
        listed = "; ".join(f"{field}={fault}" for field, fault in faults.items())
        raise ConfigurationError(f"mteb rejects the description of {name}: {listed}") from error


def meta_source(meta: ModelMeta) -> str:
    """Return the source file for the pull request to mteb; it is parsed but not run.

    Raises:
        ConfigurationError: If it is not Python, or uses a name that it does not import.
    """
    more = "from mteb.types import OutputDType\n" if meta.output_dtypes else ""
    variable = _variable(str(meta.name))
    source = _SOURCE.format(
        name=meta.name, reference=meta.reference, more=more, variable=variable, meta=meta.to_python()
    )
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError as error:
        raise ConfigurationError(f"mteb writes the description of {meta.name} in a form that is not Python.") from error
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    unknown = {node.id for node in nodes if isinstance(node, ast.Name)} - imported - {variable, "set"}
    if unknown:
        raise ConfigurationError(f"mteb describes {meta.name} with {sorted(unknown)}, which this file does not import.")
    return source


def _published(model: str, name: str | None, revision: str | None, token: str | None) -> tuple[str, str]:
    """Return the public Hub id and commit of the model."""
    if Path(model).is_dir():
        if name is None or not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            raise ConfigurationError(
                f"The leaderboard takes models on the Hub, and {model} is a folder. Push it "
                f"(st-llmpool push), then name its id and commit (--name user/name --revision with 40 hex digits), "
                f"or submit it by its id."
            )
        return name, str(revision)
    if name not in (None, model):
        raise ConfigurationError(f"name={name!r} is for a folder; {model!r} is a Hub id already. Leave it out.")
    try:
        info = HfApi(token=token).model_info(model, revision=revision)
    except Exception as error:  # of the client, of the network, or of the name
        raise ConfigurationError(
            f"{model!r} is neither a folder nor a readable model of {constants.ENDPOINT} at revision "
            f"{revision or 'main'} ({type(error).__name__}). Check id, revision, token and network."
        ) from error
    if info.private or info.gated:
        raise ConfigurationError(
            f"{model} is private or gated, and the leaderboard takes public weights only. Make it public."
        )
    return model, str(info.sha)


def _card(model: str, revision: str, token: str | None) -> dict[str, Any]:
    file = load_file_path(model, "README.md", revision=None if Path(model).is_dir() else revision, token=token)
    return read_front_matter(Path(file)).to_dict() if file else {}


def _base_model(card: dict[str, Any], name: str) -> str | None:
    bases = card.get("base_model") or []
    base = bases if isinstance(bases, str) else next(iter(bases), None)
    return None if base is None or base == name or not re.fullmatch(r"[\w.-]+/[\w.-]+", base) else base


def _embedding_parameters(model: SentenceTransformer) -> int | None:
    backbone = model.transformers_model
    return None if backbone is None else count_weights([backbone.get_input_embeddings().weight])


def _find_results(cache: ResultCache, meta: ModelMeta, weights: str, progress: Callable[[str], None]) -> list[_Result]:
    """Return the results of this model on tasks of mteb; results under its Hub id win over those of a folder."""
    place = cache.cache_path / "results" if (cache.cache_path / "results").is_dir() else cache.cache_path
    folders = [place / meta.model_name_as_path() / str(meta.revision)]
    folders += sorted(place.glob(f"local__*/{weights}")) + sorted(place.glob(f"local__*-{weights[:12]}/*"))
    found: dict[str, _Result] = {}
    local = set()
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        if path.stem not in MTEB_TASKS:
            local |= {path.stem} - {"model_meta"}
        elif path.stem not in found:
            found[path.stem] = _read_result(path)
    if local:
        progress(f"Left out, as they are not tasks of mteb: {', '.join(sorted(local))}")
    if not found:
        raise DataError(
            f"{place} has no results of {meta.name} at {meta.revision} on tasks of mteb, nor of a folder with the same "
            f"weights, prompts and form (a native push and its portable folder differ). Compute them: "
            f'st-llmpool evaluate {meta.name} --benchmark "MTEB(eng, v2)" --out RESULTS'
        )
    return list(found.values())


def _read_result(path: Path) -> _Result:
    try:
        result = TaskResult.from_disk(path)
        score = float(result.get_score())
    except Exception as error:  # mteb's own reading fails in many ways
        raise DataError(f"{path} is not a result that mteb reads ({error}). Remove it and evaluate again.") from error
    current = mteb.get_task(result.task_name).metadata.revision
    if result.dataset_revision != current:
        raise DataError(
            f"{path} is of revision {result.dataset_revision} of the data, and mteb {mteb.__version__} has {current}. "
            f"Remove it and evaluate again."
        )
    if not math.isfinite(score):
        raise DataError(f"{path} has the score {score}. Check the model for NaN (st-llmpool doctor).")
    return _Result(path, result.task_name, score)


def _copy_results(cache: ResultCache, meta: ModelMeta, found: list[_Result]) -> None:
    """Copy results to the Hub id's place in mteb's layout, where mteb also writes the description."""
    for result in found:
        cache.save_to_cache(TaskResult.from_disk(result.path), meta)
    # mteb records this copying as if it were the run; the settings recorded when the tasks ran replace that.
    tasks = {result.task for result in found}
    files = {result.path.parent / "run_settings.jsonl" for result in found}
    lines = [line for file in sorted(files) if file.is_file() for line in file.read_text("utf-8").splitlines()]
    noted = cache.get_task_result_path(found[0].task, meta).parent / "run_settings.jsonl"
    noted.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["task"] in tasks), encoding="utf-8")


def _mock_run(encoder: SentenceTransformerEncoderWrapper, meta: ModelMeta) -> str:
    encoder.mteb_model_meta = meta
    report = mteb.mock_run(encoder)
    if not report.all_passed:
        failed = "; ".join(failures for _, _, failures in report.modality_summary() if failures)
        raise InputError(f"mteb's mock run of {meta.name} fails on {failed}:\n{report.to_markdown()}")
    return report.to_markdown() + "\n"


def _variable(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower()


def _guide(meta: ModelMeta, benchmark: str, tasks: Sequence[AbsTask], found: list[_Result], source: Path) -> str:
    """Return instructions for the submission, with a list of missing tasks."""
    missing = _missing(tasks, found)
    coverage = f"{len(tasks) - len(missing)} of {len(tasks)} tasks of {benchmark} have all their results."
    if missing:
        coverage += f"\nMissing: {', '.join(missing)}. The leaderboard shows no mean without them."
    rows = "\n".join(f"| {result.task} | {result.score:.4f} |" for result in found)
    return f"""# Submission of {meta.name} to the MTEB leaderboard

Revision `{meta.revision}`, {meta.n_parameters:,} parameters, pooling included. {coverage}

1. Add `{source}` to a fork of https://github.com/embeddings-benchmark/mteb and open a pull request with the report in
   `mock_run.md`. Check the fields first: `training_datasets` lists the data on which the model is not zero-shot.
2. Once the model is in mteb: `python -c "import mteb; mteb.ResultCache('.').submit_results()"` in this folder commits
   what is in `results/` to a clone of https://github.com/embeddings-benchmark/results and says how to open the pull
   request. Disclose any training on the evaluated data there.

| Task | Main score |
| --- | ---: |
{rows}
"""


def _missing(tasks: Sequence[AbsTask], found: list[_Result]) -> list[str]:
    """Return the tasks of a benchmark that lack a split or a subset, or all of them."""
    paths = {result.task: result.path for result in found}
    names = {task.metadata.name: task for task in tasks}
    absent = [name for name in names if name not in paths]
    present = {name: TaskResult.from_disk(paths[name]) for name in names if name in paths}
    return absent + [name for name, result in present.items() if result.get_missing_evaluations(names[name])]
