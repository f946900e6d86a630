"""Settings of a study: bases, designs, seeds, and their common recipe and suite.

```yaml
description: Does pooling over all layers help on our data?
bases: {qwen: Qwen/Qwen3-0.6B}          # name in tables: Hub id, folder or builtin
seeds: [0, 1, 2]
designs:
  - {design: mean-bidirectional}
  - {design: "5"}
  - {design: "5", option: last 4 layers, change: {model: {layers: [-4, -3, -2, -1]}}}
contrasts: ["5:mean-bidirectional"]     # pre-registered; all other pairs are exploratory
recipe:                                 # as of `st-llmpool train`; {data} is the folder given as --data
  model: {tune: lora}
  data: [{source: "{data}/pairs.parquet"}]
  training: {max_steps: 1000}
  evaluation: {data: [{source: "{data}/held_out.parquet"}]}
sweep:                                  # every base and design is tuned alike at the first seed, see `sweep.py`
  training.learning_rate: [1e-4, 3e-4, 1e-3]
suite: squad_slices
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..evaluation.suite import SEARCH_TYPES, read_suite
from ..modules.errors import ConfigurationError, DataError, check_choice, nearest
from ..stats.results import MAX_CONTRASTS, MAX_MODELS, label
from ..training.recipe import Recipe, with_earlier_names
from ..utils.files import slug
from ..utils.reading import read_yaml, shown
from ..utils.settings import from_mapping, merge

_PRESETS = Path(__file__).parent / "presets"
_FORMAT = 1  # part of every key: raise it when the same settings come to give other numbers
_DATA = "{data}"
_PLAIN = ("eos", "lasttoken", "mean", "weightedmean", "max", "cls")  # poolings that are a readout and nothing else

Kind = Literal["trained", "untrained", "sweep", "bm25"]

#: Pre-registered comparisons by default, as far as a study has these designs: the main effects of attention and of the
#: readout and (at half its size) their interaction, then what a pooling over layers adds to the usual baseline.
DEFAULT_CONTRASTS = (
    "mean-bidirectional+eos-bidirectional:mean-causal+1",
    "mean-bidirectional+mean-causal:eos-bidirectional+1",
    "mean-bidirectional+1:eos-bidirectional+mean-causal",
    "5:mean-bidirectional",
    "scalar-mix:mean-bidirectional",
)


@dataclass
class DesignSettings:
    """One design of a study.

    Attributes:
        design: A name in ``DESIGNS``; any other name where `change` says attention or pooling.
        option: Name of the variant of the design in tables; empty for the plain design.
        change: Changes to the common recipe.
    """

    design: str
    option: str = ""
    change: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_model("change", self.change)

    @property
    def label(self) -> str:
        """Name in tables and contrasts."""
        return label(self.design, self.option)


@dataclass(frozen=True)
class PlannedRun:
    """One base, design and seed, or a reference.

    Args:
        id: Name of its folder.
        base: Name of the base.
        design: Name of the design.
        option: Its option.
        seed: The seed.
        recipe: The recipe's values, with ``{data}`` for the data folder.
        evaluation: Settings other than the model that the scores depend on.
        kind: A run of the ``sweep`` is not evaluated; ``untrained`` is the model before its first step; ``bm25`` has
            no model.
        trained_as: The run of the sweep that is the same training; empty if there is none.
        base_folder: Where the base is on this machine; empty is by the recipe.
    """

    id: str
    base: str
    design: str
    option: str
    seed: int
    recipe: dict[str, Any]
    evaluation: dict[str, Any]
    kind: Kind = "trained"
    trained_as: str = ""
    base_folder: str = ""

    @property
    def label(self) -> str:
        """Name of the design in tables and contrasts."""
        return label(self.design, self.option)

    @property
    def key(self) -> str:
        """A hash of all settings that its results depend on, but not of the data folder."""
        recipe = with_earlier_names(self.recipe)  # so that runs of earlier versions count
        content = [_FORMAT, recipe, self.seed, self.evaluation] + [self.kind] * (self.kind != "trained")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.kind in ("trained", "sweep") and (self.trains_backbone or self.trains_pooling)

    @property
    def trains_backbone(self) -> bool:
        """Whether the backbone or an adapter trains."""
        return self.recipe.get("model", {}).get("tune") != "pooling" or bool(self.recipe.get("stages"))

    @property
    def trains_pooling(self) -> bool:
        """Whether the pooling has weights, and a learning rate above 0."""
        from ..designs import POOLINGS

        spec = POOLINGS.get(_attention_and_pooling(self.recipe.get("model", {}))[1])
        rate = self.recipe.get("training", {}).get("pooling_learning_rate")
        return rate != 0 and (spec is None or spec.is_trainable)  # an unknown name is refused by the recipe's checks

    def training_folder(self, work: Path) -> Path:
        """Return the folder of its training, which a run of the sweep and the run that it becomes share.

        Args:
            work: Folder for checkpoints and models.
        """
        return work / (self.trained_as or self.id) / "training"

    def to_recipe(self, data_dir: Path | None, output_dir: Path, cache: Path | None = None) -> Recipe:
        """Return the recipe to train with.

        Args:
            data_dir: Folder that replaces ``{data}``.
            output_dir: Folder of the training run.
            cache: Folder for the layer summaries, which a run whose backbone is frozen reads.

        Raises:
            ConfigurationError: If a value does not fit, or `data_dir` is needed and missing.
        """
        text = json.dumps(self.recipe)
        if _DATA in text and data_dir is None:
            raise ConfigurationError(f"the study reads data from {_DATA}: name that folder (data_dir, or --data DIR).")
        values = json.loads(text.replace(_DATA, json.dumps(str(data_dir))[1:-1]))
        if self.base_folder:
            values["model"]["base"] = self.base_folder
        if "evaluation" in values:  # a run that ends below its start has diverged
            values["evaluation"] = {**values["evaluation"], "eval_on_start": True}
        recipe = Recipe.from_dict({**values, "output_dir": str(output_dir), "seed": self.seed})
        if cache is not None and recipe.model.tune == "pooling":
            recipe.training.cache = str(cache)
        return recipe


@dataclass
class Study:
    """A study as its file describes it.

    Attributes:
        designs: The designs to compare.
        recipe: Common recipe of all runs, without ``output_dir``, ``seed``, ``model.base`` and ``model.design``.
        name: Title of the report.
        description: The question, for the report.
        bases: Name to Hub id, folder or ``builtin``.
        base_folders: Base to its folder on this machine, instead of its Hub id; part of no record.
        seeds: Seeds; each design is trained once with each.
        sweep: Setting to the values to try, such as ``training.learning_rate``; `sweep.py` says how they are chosen.
        contrasts: At most six pre-registered pairs ``A:B``, or ``A+B:C+D`` of means of designs; None is those of
            `DEFAULT_CONTRASTS` that the study has.
        suite: A suite of local tasks.
        limit: Largest number of rows, queries or documents per task.
        instruct: Template for the instructions of the suite's tasks; None leaves them out.
        allow_missing: Leave out tasks of the suite that have no data.
        batch_size: Batch size of the evaluation.
        threads: CPU threads of a run; None divides the cores among parallel runs. The last digits of sums depend on
            it, so set it if results must not depend on ``--jobs``.
        untrained: Evaluate every design before its first step too, at the first seed.
        bm25: Evaluate BM25 on the search tasks of the suite too.
        rope: Half of the region of practical equivalence, in score.
        layers: Analyse the layers in the runs of the first seed.
        frozen: Runs with ``model.tune: pooling`` share one cache of layer summaries, ``cache`` in the work folder.
        withdrawn: Why the verdicts are withdrawn; the report then has this and no verdicts.

    Raises:
        ConfigurationError: From the constructor, if settings contradict each other.
    """

    designs: list[DesignSettings]
    recipe: dict[str, Any]
    name: str = "study"
    description: str = ""
    bases: dict[str, str] = field(default_factory=lambda: {"builtin": "builtin"})
    base_folders: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    sweep: dict[str, list[float]] = field(default_factory=dict)
    contrasts: list[str] | None = None
    suite: str = "squad_slices"
    limit: int | None = None
    instruct: str | None = None
    allow_missing: bool = False
    batch_size: int = 32
    threads: int | None = None
    untrained: bool = True
    bm25: bool = True
    rope: float = 0.01
    layers: bool = True
    frozen: bool = False
    withdrawn: str = ""

    def __post_init__(self) -> None:
        _check_model("recipe", self.recipe)
        labels = [design.label for design in self.designs]
        listed: dict[str, list[Any]] = {"designs": labels, "seeds": self.seeds}
        for what, names in listed.items():
            if len(set(names)) < len(names) or not names:
                raise ConfigurationError(f"{what} must have entries, each once; they are {names}.")
        if not 0 < self.rope < 1:
            raise ConfigurationError(f"rope={self.rope} must be above 0 and below 1, in units of the score.")
        for name, values in self.sweep.items():
            if len(set(values)) < len(values) or not values:
                raise ConfigurationError(f"sweep.{name} must have values, each once; they are {values}.")
        if not 2 <= len(labels) <= MAX_MODELS:
            raise ConfigurationError(f"a study compares 2 to {MAX_MODELS} designs; this one has {len(labels)}.")
        if not self.bases:
            raise ConfigurationError("bases is empty; name one, such as bases: {builtin: builtin}.")
        for name in self.base_folders:
            check_choice("base", name, tuple(self.bases))
        from ..designs import DESIGNS  # imports torch, which takes seconds

        for design in self.designs:
            own = design.change.get("model", {})
            if design.design not in DESIGNS and not {"attention", "pooling"} & set(own):
                raise ConfigurationError(
                    f"design {design.design!r} is unknown; it is one of {list(DESIGNS)}, or a name of your own with "
                    f"change.model.attention and change.model.pooling.{nearest(design.design, DESIGNS)}"
                )
        for key, place in (("output_dir", self.recipe), ("seed", self.recipe), ("base", self.recipe.get("model", {}))):
            if key in place:
                raise ConfigurationError(f"recipe says {key!r}, which the study itself sets; leave it out.")
        if self.contrasts is None:
            self.contrasts = [pair for pair in DEFAULT_CONTRASTS if designs_of(pair) <= set(labels)]
        if len(self.contrasts) > MAX_CONTRASTS:
            raise ConfigurationError(
                f"contrasts has {len(self.contrasts)} pairs; verdicts can rest on {MAX_CONTRASTS} at most. All other "
                f"pairs are tested as exploratory without being named."
            )
        for contrast in self.contrasts:
            for name in sorted(designs_of(contrast)):
                if name not in labels or contrast.count(":") != 1:
                    raise ConfigurationError(
                        f"contrast {contrast!r} must be two of {', '.join(labels)} with a colon between."
                        f"{nearest(name, labels)}"
                    )

    @classmethod
    def load(cls, name_or_file: str | Path) -> Study:
        """Read a study by the name of a preset or from a YAML file.

        Raises:
            DataError: If there is no such preset or file.
            ConfigurationError: If the file is not YAML, or has keys or values of the wrong kind.

        Example:
            >>> Study.load("quick").seeds
            [0]
        """
        is_preset = str(name_or_file) in presets()
        path = _PRESETS / f"{name_or_file}.yaml" if is_preset else Path(name_or_file)
        if not path.is_file():
            raise DataError(
                f"study {str(name_or_file)!r} is neither a file nor one of {', '.join(presets())}."
                f"{nearest(str(name_or_file), presets())}"
            )
        values = read_yaml(path)
        return from_mapping(cls, {"name": path.stem, **values} if isinstance(values, dict) else values)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, including defaults."""
        return asdict(self)

    @property
    def labels(self) -> list[str]:
        """Names of the designs in tables, in order."""
        return [design.label for design in self.designs]

    def runs(self) -> list[PlannedRun]:
        """Return all runs, seed by seed, so that a study that stops early has complete comparisons.

        Example:
            >>> Study.load("quick").runs()[0].id
            'builtin_mean-bidirectional_seed0'
        """
        return [self._run(base, design, seed) for seed in self.seeds for base in self.bases for design in self.designs]

    def reference_runs(self) -> list[PlannedRun]:
        """Return BM25, where the suite has search tasks, and the untrained run of every base and design.

        Example:
            >>> [run.id for run in Study.load("quick").reference_runs()][:2]
            ['bm25', 'builtin_mean-bidirectional_untrained']
        """
        runs = []
        if self.bm25 and any(task.type in SEARCH_TYPES for task in read_suite(self.suite).tasks):
            runs.append(PlannedRun("bm25", "", "bm25", "", self.seeds[0], {}, self._evaluation, "bm25"))
        if self.untrained:
            for run in self.runs()[: len(self.bases) * len(self.designs)]:
                name = run.id.removesuffix(f"seed{run.seed}") + "untrained"
                runs.append(replace(run, id=name, recipe=_of_untrained(run.recipe), kind="untrained"))
        return runs

    @property
    def _evaluation(self) -> dict[str, Any]:
        return {"suite": Path(self.suite).stem, "limit": self.limit, "tasks": self._tasks_digest}

    @cached_property
    def _tasks_digest(self) -> str:
        """A hash of the suite's settings that scores depend on; mteb's revisions cover the data."""
        chosen = read_suite(self.suite).tasks
        if self.instruct is not None:
            chosen = tuple(task.instructed(self.instruct) for task in chosen)
        tasks = [asdict(task) for task in chosen]
        for task in tasks:
            del task["corpus"], task["language"], task["instruction"]
        return hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest()[:16]

    def _run(self, base: str, design: DesignSettings, seed: int) -> PlannedRun:
        from ..designs import DESIGNS

        model: dict[str, Any] = {"base": self.bases[base]}
        if design.design in DESIGNS and not {"attention", "pooling"} & set(design.change.get("model", {})):
            model["design"] = design.design
        recipe = merge(merge(self.recipe, {"model": model}), design.change)
        parts = [base, design.design, design.option, f"seed{seed}"]
        name = "_".join(slug(part) for part in parts if part)
        folder = self.base_folders.get(base, "")
        return PlannedRun(name, base, design.design, design.option, seed, recipe, self._evaluation, base_folder=folder)


def _of_untrained(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a recipe that its model depends on before training."""
    precision = {key: value for key, value in recipe.get("training", {}).items() if key == "precision"}
    return {key: recipe[key] for key in ("model", "data") if key in recipe} | {"training": precision}


def designs_of(contrast: str) -> set[str]:
    """Return the designs that a contrast names.

    Example:
        >>> sorted(designs_of("a+b:c"))
        ['a', 'b', 'c']
    """
    return {name for side in contrast.split(":") for name in side.split("+")}


def factors(model: Mapping[str, Any]) -> dict[str, str]:
    """Return attention, readout and pooling of a recipe's ``model``; a pooling of the readout alone is ``plain``.

    Example:
        >>> factors({"design": "1"})
        {'attention': 'causal', 'readout': 'eos', 'pooling': 'plain'}
        >>> factors({"attention": "causal", "pooling": "multi_layer", "layer_readout": "mean"})
        {'attention': 'causal', 'readout': 'mean', 'pooling': 'multi_layer'}
    """
    attention, pooling = _attention_and_pooling(model)
    readout = model.get("layer_readout") or {"causal": "eos"}.get(attention, "mean")
    if pooling in _PLAIN:
        readout, pooling = "eos" if pooling == "lasttoken" else pooling, "plain"
    return {"attention": attention, "readout": readout, "pooling": pooling}


def _attention_and_pooling(model: Mapping[str, Any]) -> tuple[str, str]:
    from ..designs import DESIGNS

    known = DESIGNS.get(str(model.get("design")))
    attention = model.get("attention") or (known.attention if known else "bidirectional")
    return attention, model.get("pooling") or (known.pooling if known else "multi_layer")


def _check_model(where: str, recipe: dict[str, Any]) -> None:
    if not isinstance(recipe.get("model", {}), dict):
        raise ConfigurationError(f"{where}.model={shown(recipe['model'])} must hold keys and values.")


def presets() -> list[str]:
    """Return the names of the studies that come with the package.

    Example:
        >>> "quick" in presets()
        True
    """
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))
