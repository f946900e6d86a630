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
suite: squad_slices
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..evaluation.suite import read_suite
from ..modules.errors import ConfigurationError, DataError, nearest
from ..stats.results import MAX_CONTRASTS, MAX_MODELS, label
from ..training.recipe import Recipe, with_earlier_names
from ..utils.files import slug
from ..utils.reading import read_yaml, shown
from ..utils.settings import from_mapping, merge

_PRESETS = Path(__file__).parent / "presets"
_FORMAT = 1  # part of every key: raise it when the same settings come to give other numbers
_DATA = "{data}"
_PLAIN = ("eos", "lasttoken", "mean", "weightedmean", "max", "cls")  # poolings that are a readout and nothing else

#: Pre-registered comparisons by default, as far as a study has these designs.
DEFAULT_CONTRASTS = ("5:mean-bidirectional", "5:4", "4:2", "5:3", "3:1", "5:1")


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
    """One base, design and seed.

    Args:
        id: Name of its folder.
        base: Name of the base.
        design: Name of the design.
        option: Its option.
        seed: The seed.
        recipe: The recipe's values, with ``{data}`` for the data folder.
        evaluation: Settings other than the model that the scores depend on.
    """

    id: str
    base: str
    design: str
    option: str
    seed: int
    recipe: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def label(self) -> str:
        """Name of the design in tables and contrasts."""
        return label(self.design, self.option)

    @property
    def key(self) -> str:
        """A hash of all settings that its results depend on, but not of the data folder."""
        recipe = with_earlier_names(self.recipe)  # so that runs of earlier versions count
        content = json.dumps([_FORMAT, recipe, self.seed, self.evaluation], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

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
        seeds: Seeds; each design is trained once with each.
        contrasts: At most six pre-registered pairs ``A:B``; None is those of `DEFAULT_CONTRASTS` that the study has.
        suite: A suite of local tasks.
        limit: Largest number of rows, queries or documents per task.
        instruct: Template for the instructions of the suite's tasks; None leaves them out.
        allow_missing: Leave out tasks of the suite that have no data.
        batch_size: Batch size of the evaluation.
        threads: CPU threads of a run; None divides the cores among parallel runs. The last digits of sums depend on
            it, so set it if results must not depend on ``--jobs``.
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
    seeds: list[int] = field(default_factory=lambda: [0])
    contrasts: list[str] | None = None
    suite: str = "squad_slices"
    limit: int | None = None
    instruct: str | None = None
    allow_missing: bool = False
    batch_size: int = 32
    threads: int | None = None
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
        if not 2 <= len(labels) <= MAX_MODELS:
            raise ConfigurationError(f"a study compares 2 to {MAX_MODELS} designs; this one has {len(labels)}.")
        if not self.bases:
            raise ConfigurationError("bases is empty; name one, such as bases: {builtin: builtin}.")
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
            self.contrasts = [pair for pair in DEFAULT_CONTRASTS if set(pair.split(":")) <= set(labels)]
        if len(self.contrasts) > MAX_CONTRASTS:
            raise ConfigurationError(
                f"contrasts has {len(self.contrasts)} pairs; verdicts can rest on {MAX_CONTRASTS} at most. All other "
                f"pairs are tested as exploratory without being named."
            )
        for contrast in self.contrasts:
            for name in contrast.split(":"):
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
        evaluation = {"suite": Path(self.suite).stem, "limit": self.limit, "tasks": self._tasks_digest}
        parts = [base, design.design, design.option, f"seed{seed}"]
        name = "_".join(slug(part) for part in parts if part)
        return PlannedRun(name, base, design.design, design.option, seed, recipe, evaluation)


def factors(model: Mapping[str, Any]) -> dict[str, str]:
    """Return attention, readout and pooling of a recipe's ``model``; a pooling of the readout alone is ``plain``.

    Example:
        >>> factors({"design": "1"})
        {'attention': 'causal', 'readout': 'eos', 'pooling': 'plain'}
        >>> factors({"attention": "causal", "pooling": "multi_layer", "layer_readout": "mean"})
        {'attention': 'causal', 'readout': 'mean', 'pooling': 'multi_layer'}
    """
    from ..designs import DESIGNS

    known = DESIGNS.get(str(model.get("design")))
    attention = model.get("attention") or (known.attention if known else "bidirectional")
    pooling = model.get("pooling") or (known.pooling if known else "multi_layer")
    readout = model.get("layer_readout") or {"causal": "eos"}.get(attention, "mean")
    if pooling in _PLAIN:
        readout, pooling = "eos" if pooling == "lasttoken" else pooling, "plain"
    return {"attention": attention, "readout": readout, "pooling": pooling}


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
