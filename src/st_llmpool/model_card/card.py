"""Model cards: sentence-transformers' card with the design, attention, cost, layer use, training and results."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model_card import generate_model_card

from ..attention_proof import verify_attention
from ..hub.loading import load_model
from ..modules.errors import ConfigurationError, DataError, StLlmpoolError, __version__
from ..modules.portable import code_files
from ..utils.files import write_atomically
from ..utils.parameters import count_parameters
from ..utils.random_state import preserve_rng_state
from ..utils.reading import read_json_object, read_text, read_yaml
from ..utils.words import ranges
from .figures import draw_curve, draw_design, draw_layer_use
from .identity import IdentifiedCardData
from .layer_use import SAMPLE_TEXTS, layer_use

#: The model's name in the card of a model that has none yet; `push` writes the repository's in its place.
PLACEHOLDER = "path/to/this/folder"
TEMPLATE = Path(__file__).with_name("template.md")

_DATA_SUFFIXES = {".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt"}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class EmbedderCardData(IdentifiedCardData):
    """Content of a model's card; `build_embedder` sets it on its models, so every plain save writes the card.

    Attributes:
        training: Content of ``training.json``.
        recipe: The recipe as YAML.
        base_title: Name of the base; None derives it from where the base was loaded.
        data: Training sets, each with ``name``, ``rows`` (None if not counted) and ``license``.
        results: Scores, each with ``task``, ``type``, ``metric``, ``score`` and optionally ``interval``.
        native: Describe how to load a native export rather than a portable model.
        training_examples: Show rows of the training data verbatim, as sentence-transformers does by default.

    Example:
        >>> from st_llmpool import build_embedder
        >>> from st_llmpool.data import builtin_backbone
        >>> type(build_embedder(builtin_backbone(), pooling="mean", verify=False).model_card_data).__name__
        'EmbedderCardData'
    """

    training: dict[str, Any] | None = None
    recipe: str | None = None
    base_title: str | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    native: bool = False
    training_examples: bool = False
    template_path: Path = field(default=TEMPLATE, init=False, repr=False)
    without_forwards = False

    def set_widget_examples(self, dataset: Any) -> None:
        """Keep rows of the training data for the card only if asked for: they may be private."""
        if self.training_examples:
            super().set_widget_examples(dataset)

    def generate_usage_snippet(self) -> str:
        """Return sentence-transformers' snippet, with trust_remote_code for a portable model."""
        snippet = super().generate_usage_snippet()
        if not self.model_id:
            snippet = snippet.replace("# Download from the 🤗 Hub\n", "")
            snippet = snippet.replace("sentence_transformers_model_id", PLACEHOLDER)
        if self.native:
            return snippet
        with_flag = r"\1, trust_remote_code=True)"
        return re.sub(r'(SentenceTransformer\(".*?")\)', with_flag, snippet)

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """Return the template's variables; draws the figures if the model is being saved."""
        model: Any = self.model
        self._set_base_model(model)
        measured = not self.without_forwards
        with preserve_rng_state():
            use = _layer_use(model) if measured else None
            design = _design(model, self.base_title, native=self.native, measured=measured)
        figures = self._draw(model, use) if self.save_dir and measured else []
        metrics = list({row["metric"]: None for row in self.results})
        results = {"model-index": self._model_index(design["title"]), "metrics": metrics} if self.results else {}
        return {
            **super().get_model_specific_metadata(),
            "base_model": getattr(self, "base_model", None),
            "given_title": None if self.model_name == self.get_default_model_name() else self.model_name,
            "design": design,
            "prompts": {name: prompt for name, prompt in model.prompts.items() if prompt},
            "layer_use": None if use is None else {**asdict(use), "texts": len(SAMPLE_TEXTS)},
            "figures": figures,
            **results,
        }

    def _set_base_model(self, model: Any) -> None:
        """Set the base if its name is a Hub id: sentence-transformers asks the Hub, or omits it."""
        adapter = _adapter(model)
        name = adapter.base_model_name_or_path if adapter else model[0].config._name_or_path
        if not getattr(self, "base_model", None) and name and _REPOSITORY.fullmatch(without_folders(name)):
            self.base_model = name

    def _draw(self, model: Any, use: Any) -> list[str]:
        folder = Path(str(self.save_dir)) / "assets"
        backbone = model[0]
        drawn = {
            "design": draw_design(
                folder / "design.png",
                attention=backbone.attention,
                read=f"{backbone.layer_readout} of each layer" if backbone.layers else "tokens of the last layer",
                pooling=_pooling_name(model),
                num_layers=backbone.num_layers,
                layers=backbone.layers or [backbone.num_layers],
            )
        }
        if use is not None:
            drawn["layers"] = draw_layer_use(folder / "layers.png", use)
        if self.training and self.training["losses"]:
            scores = self.training.get("evaluations", ())
            drawn["loss"] = draw_curve(folder / "loss.png", self.training["losses"], "training loss", scores)
        return [name for name, written in drawn.items() if written]

    def _model_index(self, title: str) -> list[dict[str, Any]]:
        name = str(self.model_id or title)
        rows = [
            EvalResult(
                task_type=row["type"],
                dataset_type=row["task"],
                dataset_name=row["task"],
                metric_type=row["metric"],
                metric_value=round(row["score"], 6),
            )
            for row in self.results
        ]
        return eval_results_to_model_index(name, rows)


@contextmanager
def card_without_forwards(model: SentenceTransformer) -> Iterator[None]:
    """Omit figures and everything that needs a forward pass from cards written inside the block.

    For checkpoints and sharded models.
    """
    card = model.model_card_data
    card.without_forwards = True
    try:
        yield
    finally:
        card.without_forwards = False


def write_card(
    folder: Path,
    *,
    run: Path | None = None,
    results: Sequence[dict[str, Any]] = (),
    model_id: str | None = None,
    license: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Regenerate the card of a saved model, with results and facts about its training.

    Args:
        folder: A saved model with an ``LLMTransformer``.
        run: The run's folder, with ``training.json`` and ``recipe.yaml``; by default the parent of `folder`.
        results: As ``EmbedderCardData.results``. The existing card's tags, widget, and results of other tasks and
            metrics are kept.
        model_id: Hub id that the model will have.
        license: Licence of the model.
        trust_remote_code: Run code in `folder` that is not the installed package's.

    Returns:
        The card's file.

    Raises:
        ConfigurationError: If the model has another backbone: sentence-transformers writes its card.
        DataError: If the existing card or the run's files cannot be read.

    Example:
        >>> write_card(Path("runs/mine/model"), license="apache-2.0")  # doctest: +SKIP
        PosixPath('runs/mine/model/README.md')
    """
    model = load_model(folder, trust_remote_code=trust_remote_code, device="cpu")
    if not hasattr(model[0], "layer_readout"):
        raise ConfigurationError(f"{folder} has no LLMTransformer, so sentence-transformers writes its card.")
    given = {"model_id": model_id, "license": license, "results": list(results)}
    return write_card_of(model, folder, earlier=folder / "README.md", run=run or folder.parent, given=given)


def write_card_of(
    model: SentenceTransformer,
    folder: Path,
    *,
    earlier: Path,
    run: Path,
    given: Mapping[str, Any],
    native: bool = False,
) -> Path:
    """Write the card of a loaded model into `folder`.

    Args:
        model: A model with an ``LLMTransformer``.
        folder: Folder of the saved model.
        earlier: An existing card, whose id, licence and results are kept unless `given` has others; it may be missing.
        run: As for :func:`write_card`.
        given: Fields of :class:`EmbedderCardData`.
        native: As in :class:`EmbedderCardData`.

    Returns:
        The card's file.
    """
    known = _read_card(earlier) if earlier.is_file() else {}
    tags, widget = known.pop("tags", []), known.pop("widget", [])
    results = {(row["task"], row["metric"]): row for row in (*known.pop("results", ()), *given.get("results", ()))}
    fields = {**known, **{name: value for name, value in given.items() if value}, "results": list(results.values())}
    card = EmbedderCardData(**fields, **training_facts(run), native=native)
    card.add_tags(tags)
    card.widget = widget
    model.model_card_data = card
    card.register_model(model)
    card.save_dir = str(folder)
    file = folder / "README.md"
    write_atomically(file, generate_model_card(model))
    return file


def read_front_matter(file: Path) -> Any:
    """Return the ``ModelCardData`` of a card."""
    try:
        return ModelCard(read_text(file), ignore_metadata_errors=True).data
    except StLlmpoolError:
        raise
    except Exception as error:  # of YAML or of huggingface_hub's checks
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"The front matter of {file} cannot be read: {reason}. Fix or delete it.") from error


def _read_card(file: Path) -> dict[str, Any]:
    data = read_front_matter(file)
    results = [
        {"task": row.dataset_name, "type": row.task_type, "metric": row.metric_type, "score": row.metric_value}
        for row in data.eval_results or ()
    ]
    model_id = data.model_name if _REPOSITORY.fullmatch(str(data.model_name)) else None
    kept = {name: vars(data).get(name) for name in ("tags", "widget")}
    if not all(value is None or isinstance(value, list) for value in kept.values()):
        raise DataError(f"The front matter of {file} has tags or a widget that are not a list. Fix or delete them.")
    return {
        "license": data.license,
        "language": data.language,
        "results": results,
        "model_id": model_id,
        "tags": [str(tag) for tag in kept["tags"] or ()],
        "widget": kept["widget"] or [],
    }


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the finite scores of an output folder of ``st-llmpool evaluate``, as ``EmbedderCardData.results``.

    Raises:
        DataError: If the folder has no table of scores.
    """
    file = folder / "scores.json"
    if not file.is_file():
        raise DataError(f"{file} does not exist. Name the --out folder of st-llmpool evaluate.")
    rows = read_json_object(file).get("rows")
    wanted = {"task", "type", "metric", "score"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and wanted <= row.keys() for row in rows):
        raise DataError(f"{file} must hold rows with {', '.join(sorted(wanted))}. Run st-llmpool evaluate again.")
    return [row for row in rows if row["score"] is not None]


def training_facts(run: Path) -> dict[str, Any]:
    """Return fields of :class:`EmbedderCardData` from a run's ``training.json`` and ``recipe.yaml``."""
    if not (run / "training.json").is_file():
        return {}
    facts = read_json_object(run / "training.json")
    recipe = read_yaml(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else {}
    try:
        return _facts_of(run, facts, recipe)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(
            f"{run}: training.json or recipe.yaml is not of st-llmpool train ({error!r}). Name the run's folder."
        ) from error


def _facts_of(run: Path, facts: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    base = recipe.get("model", {}).get("base")
    return {
        "training": facts,
        "recipe": yaml.safe_dump(_without_local_paths(recipe), sort_keys=False) if recipe else None,
        "data": [*_stage_sets(run), *_training_sets(facts)],
        "base_title": "the built-in backbone of st_llmpool" if base == "builtin" else base and without_folders(base),
    }


def _stage_sets(run: Path) -> list[dict[str, Any]]:
    """Return the training sets of earlier stages, in order; their folders are called ``1-mntp`` and so on."""
    reports = sorted(run.glob("stages/*/training.json"), key=lambda file: int(file.parent.name.partition("-")[0]))
    return [
        {**row, "name": f"{row['name']} ({report.parent.name.partition('-')[2]})"}
        for report in reports
        for row in _training_sets(read_json_object(report))
    ]


def _training_sets(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the training sets that a ``training.json`` names; older versions wrote no licences."""
    rows, licenses = facts.get("rows", {}), facts.get("licenses", {})
    return [{"name": name, "rows": rows.get(name), "license": licenses.get(name)} for name in {**rows, **licenses}]


def without_folders(value: str) -> str:
    """Return the last part of a local path, and any other text, such as a Hub id, unchanged.

    Example:
        >>> without_folders("/data/secret/pairs.jsonl"), without_folders("org/name")
        ('pairs.jsonl', 'org/name')
    """
    if "/" not in value or "\n" in value:
        return value
    path = Path(value)
    is_long = value.count("/") > 1 and not re.search(r"\s", value)
    is_local = (
        path.is_absolute() or value.startswith((".", "~")) or path.suffix in _DATA_SUFFIXES or os.path.exists(path)
    )
    return path.name if is_long or is_local else value


def _without_local_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe without local folders, which help nobody and may be private."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items() if key not in ("output_dir", "data_dir")}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        return without_folders(value) if isinstance(value, str) else value

    return cast("dict[str, Any]", shorten(recipe))


def _layer_use(model: Any) -> Any:
    try:
        return layer_use(model)
    except ConfigurationError:  # the design reads no layers
        return None


def _adapter(model: Any) -> Any:
    configs = getattr(model[0].model, "peft_config", None) or {}
    return next(iter(configs.values()), None) if isinstance(configs, dict) else None


def _pooling_name(model: Any) -> str:
    name = type(model[1]).__name__
    return str(getattr(model[1], "pooling_mode", "")) if name == "Pooling" else name


def _design(model: Any, base_title: str | None, *, native: bool, measured: bool) -> dict[str, Any]:
    backbone, pooling, adapter = model[0], model[1], _adapter(model)
    settings = pooling.get_config_dict() if hasattr(pooling, "get_config_dict") else {}
    source = adapter.base_model_name_or_path if adapter else backbone.config._name_or_path
    base = base_title or without_folders(source) or "an unnamed base"
    ours = [type(module) for module in model if hasattr(module, "is_st_llmpool_module")]
    files = {file for module_class in ours for file in code_files(Path(inspect.getfile(module_class)))}
    return {
        "version": __version__,
        "source": without_folders(source),
        "is_local": not _REPOSITORY.fullmatch(source),
        "base": base,
        "title": f"{base}: {backbone.attention} attention, {_pooling_name(model)}",
        "backbone": backbone,
        "architecture": type(backbone.model).__name__,
        "layers": ranges(backbone.layers),
        "causal_layers": ranges(backbone.causal_layers),
        "pooling": _pooling_name(model),
        "settings": [f"{name} {value}" for name, value in settings.items() if not isinstance(value, dict | list)],
        "adapter": adapter,
        "native": native,
        "files": len(files),
        "lines": sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files),
        "measured": _measured_attention(model) if measured else None,
        "cost": _cost(model),
    }


def _measured_attention(model: Any) -> dict[str, str]:
    try:
        return {"verdict": verify_attention(model, light=True).verdict}
    except StLlmpoolError as error:
        return {"error": str(error)}


def _cost(model: Any) -> list[tuple[str, str]]:
    backbone, adapter, pooling = count_parameters(model).values()
    embeddings = model[0].model.get_input_embeddings()
    lookup = embeddings.weight.numel() if embeddings is not None else 0
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20
    return [
        ("parameters", f"{backbone + adapter + pooling:,}"),
        ("in the backbone", f"{backbone:,}"),
        *([("in the adapter", f"{adapter:,}")] if adapter else []),
        ("in the pooling", f"{pooling:,}"),
        ("operations per token (approximate)", f"{2 * (backbone + adapter - lookup) / 1e9:.3g} GFLOP"),
        ("weights in memory", f"{size:,.0f} MiB"),
    ]
