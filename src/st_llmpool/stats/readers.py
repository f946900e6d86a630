"""Read scores into one tidy table: mteb's result folders, a study's results, or a CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ..evaluation.suite import read_suite
from ..modules.errors import ConfigurationError, DataError, nearest
from ..utils.reading import check_file, check_rows, read_yaml
from ..utils.words import listed
from .results import COLUMNS, DEFAULTS, KEY, Results, complete

if TYPE_CHECKING:
    from .mteb_files import ModelFiles

_NO_SCORE = ("", "na", "none", "null")  # what a table may hold where there is no score


def read_results(
    paths: Sequence[str | Path],
    *,
    task_types: Mapping[str, str] | None = None,
    models: Sequence[str] | None = None,
) -> Results:
    r"""Read results of one or several models and checks them.

    Args:
        paths: Each is a folder of mteb's result files (of one model, of several, an mteb cache, a clone of a results
            repository) or a table, `.csv` or `.parquet`, with the columns task, model (or design) and score, and
            where wanted task_type, base, option, seed, split, subset, metric and item. ``NAME=PATH`` gives the one
            model in PATH that name.
        task_types: Task to type, for tasks that neither the table nor mteb nor a shipped suite knows, or to overrule
            them.
        models: Names of the models to read; by default all.

    Raises:
        DataError: If a path or a column is missing, a value is not what it should be, a task has no type, or a score
            is repeated. The message names the file.
        ConfigurationError: If `models` or ``NAME=PATH`` does not fit what is there.

    Example:
        >>> _ = Path("scores.csv").write_text("task,task_type,model,score\nSts12,STS,a,0.5\nSts12,STS,b,0.6\n")
        >>> read_results(["scores.csv"]).scores[["design", "task", "task_type", "score"]]
          design   task task_type  score
        0      a  Sts12       STS    0.5
        1      b  Sts12       STS    0.6
    """
    tables: list[pd.DataFrame] = []
    files: list[tuple[str, Path, ModelFiles]] = []
    notes: list[str] = []
    for given in paths:
        name, path = _split_name(str(given))
        if path.is_dir():
            from .mteb_files import find_models  # imports mteb, which takes seconds

            files += [(name, path, model) for model in find_models(path)]
        else:
            tables.append(_renamed(_read_table(path), name, path))
    known = {design for table in tables for design in table["design"]} | {model.name for _, _, model in files}
    for model in models or ():
        if model not in known:
            raise ConfigurationError(f"no result is of {model!r}; there are {listed(known)}.{nearest(model, known)}")
    if models:
        tables = [table[table["design"].isin(models)] for table in tables]
        files = [entry for entry in files if entry[2].name in models]
    if files:
        from .mteb_files import read_models

        table, notes = read_models([model for _, _, model in files], _designs(files))
        tables.append(table)
    everything = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    if everything.empty:
        raise DataError(f"{', '.join(map(str, paths)) or 'no path'}: there are no results.")
    everything["task_type"] = everything["task"].map(_types_of_tasks(everything, task_types or {}))
    return Results(_without_repeats(everything).reset_index(drop=True), tuple(notes))


def read_task_types(path: Path) -> dict[str, str]:
    """Read the types of tasks from a YAML file: a suite (see `st_llmpool.evaluation.suite`), or task to type.

    Raises:
        DataError: If there is no such file.
        ConfigurationError: If it holds something else.

    Example:
        >>> file = Path("types.yaml")
        >>> _ = file.write_text("OurSearch: Retrieval")
        >>> read_task_types(file)
        {'OurSearch': 'Retrieval'}
    """
    content = read_yaml(check_file(path))
    if isinstance(content, dict) and isinstance(content.get("tasks"), list):
        return {task.name: task.type for task in read_suite(path).tasks}
    if not isinstance(content, dict) or not all(isinstance(kind, str) for kind in content.values()):
        raise ConfigurationError(f"{path} must be a suite file, or have lines such as MyTask: Retrieval.")
    return {str(task): kind for task, kind in content.items()}


def _split_name(given: str) -> tuple[str, Path]:
    """Split ``NAME=PATH``; a path that holds an equals sign and exists is a path."""
    name, equals, path = given.partition("=")
    if equals and name and not Path(given).exists():
        given = path
    else:
        name = ""
    if not Path(given).exists():
        folder = Path(given).parent
        siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise DataError(f"{given} does not exist.{nearest(Path(given).name, siblings)}")
    return name, Path(given)


def _read_table(path: Path) -> pd.DataFrame:
    """Return the rows of a table, with all `COLUMNS`."""
    check_file(path)
    try:
        if path.suffix == ".csv":
            check_rows(path)
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            raise DataError(f"{path} is neither a folder nor a .csv or .parquet table.")
    except (OSError, ValueError) as error:  # pandas' and Arrow's own errors are among them
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as a table: {' '.join(str(error).split())[:300]}") from error
    if "model" in table and "design" in table:
        raise DataError(f"{path} has both a column 'model' and a column 'design'; they are the same here, keep one.")
    for column, other in (("task", ""), ("model", "design"), ("score", "")):
        if column not in table and other not in table:
            names = f"{column!r} (or {other!r})" if other else repr(column)
            known = ", ".join(map(str, table.columns))
            raise DataError(f"{path} has no column {names}; it has {known}.{nearest(column, table.columns)}")
    table = table.rename(columns={"model": "design"})
    if table.empty:
        raise DataError(f"{path} has no rows.")
    empty = table["score"].astype(str).str.strip().str.lower().isin(_NO_SCORE)
    scores = _numbers(table["score"].mask(empty), path)
    table = complete(table.assign(score=scores, file=str(path)))
    for column in ("task", "design"):
        missing = table.index[table[column] == ""]
        if len(missing):
            raise DataError(f"{path}: column {column!r} is empty in row {missing[0] + 1}.")
    return table[table["score"].notna() | ~empty]


def _numbers(values: pd.Series, path: Path) -> pd.Series:
    """Return scores as floats."""
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    wrong = values.index[(numbers.isna() & values.notna()) | numbers.isin([float("inf"), float("-inf")])]
    if len(wrong):
        raise DataError(
            f"{path}: column 'score' holds {values[wrong[0]]!r} in row {wrong[0] + 1}, expected a finite number, or "
            f"nothing where there is no score."
        )
    return numbers


def _renamed(table: pd.DataFrame, name: str, path: Path) -> pd.DataFrame:
    if not name:
        return table
    designs = table["design"].unique()
    if len(designs) > 1:
        raise ConfigurationError(
            f"{name}={path}: the name must be of one model, there are {listed(designs)}. Leave the name out."
        )
    return table.assign(design=name)


def _designs(files: Sequence[tuple[str, Path, ModelFiles]]) -> list[tuple[str, str]]:
    """Return design and option of each model: its name and, where several share it, what distinguishes them."""
    given: dict[tuple[str, Path], list[ModelFiles]] = {}
    models: dict[str, list[tuple[Path, str]]] = {}
    for name, path, model in files:
        given.setdefault((name, path), []).append(model)
        models.setdefault(name or model.name, []).append((path, model.variant))
    for (name, path), found in given.items():
        if name and len(found) > 1:
            shown = listed(f"{model.name} @ {model.variant}" for model in found)
            raise ConfigurationError(
                f"{name}={path}: the name must be of one model, there are {shown}. Leave the name out, or "
                f"name the folder of one."
            )
    designs = []
    for name, path, model in files:
        same = models[name or model.name]
        nameless = {place for place, variant in same if not variant}  # nothing says that these are one model
        several = len({variant for _, variant in same}) > 1
        option = model.variant if several else ""
        designs.append((name or model.name, str(path) if not model.variant and len(nameless) > 1 else option))
    return designs


def _types_of_tasks(table: pd.DataFrame, given: Mapping[str, str]) -> dict[str, str]:
    """Return the type of every task: as given, else as in the table, else as in mteb or a shipped suite."""
    types: dict[str, str] = {}
    for task, rows in table.groupby("task", sort=False):
        found = sorted(set(rows["task_type"]) - {""})
        if len(found) > 1 and task not in given:
            files = listed(rows["file"])
            raise DataError(f"task {task} has several types, {', '.join(found)}, in {files}; it must have one.")
        types[str(task)] = given.get(str(task), found[0] if found else "")
    unknown = [task for task, kind in types.items() if not kind]
    if unknown:
        from .mteb_files import known_task_types

        types |= known_task_types(unknown)
        unknown = [task for task in unknown if not types[task]]
    if unknown:
        files = listed(table.loc[table["task"].isin(unknown), "file"])
        raise DataError(
            f"the type of {listed(unknown)} is not known ({files}): no column 'task_type' gives it, and neither mteb "
            f"nor a shipped suite has such a task. Give it: task_types, or --task-types FILE."
        )
    return types


def _without_repeats(table: pd.DataFrame) -> pd.DataFrame:
    """Drop repeated rows; two values of the same score are an error."""
    table = table.drop_duplicates([*KEY, "score"])
    repeated = table[table.duplicated(KEY, keep=False)]
    if len(repeated):
        first = repeated.iloc[0]
        same = repeated[(repeated[KEY] == first[KEY]).all(axis=1)]
        key = ", ".join(f"{name} {first[name]}" for name in KEY if first[name] not in ("", DEFAULTS[name]))
        raise DataError(
            f"{listed(same['file'])}: there are several scores ({listed(same['score'])}) of {key}. Name their seeds, "
            f"splits or subsets in columns of these names, or several models by NAME=PATH."
        )
    return table
