"""Retrieval pairs from the docstrings of the packages that are installed on this machine.

Every Python environment holds tens of thousands of short descriptions beside longer ones, written by people and split
into summary and body by convention (PEP 257). They are parsed from source: nothing is imported, nothing downloaded.
"""

from __future__ import annotations

import ast
import gc
import gzip
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from ..modules.errors import DataError, nearest
from ..utils.files import atomic_file

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)

OWN_DISTRIBUTION = "st-llmpool"
STANDARD_LIBRARY = "python"

# Chosen once, so that what every installation has puts sensible packages into each split: networkx (which torch
# requires), rich and narwhals into test, huggingface-hub and jinja2 into validation, the rest of them into train.
_SALT = "st-llmpool-docstrings-3434"
_CACHE_FORMAT = 1  # raise it when extraction changes, so that old caches are not read

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_vendor", "vendor", "_vendored", "site-packages", "dist-packages", "__pycache__"}
    | {"idlelib", "turtledemo", "ensurepip", "lib2to3"}
)
_MAX_TEXT_CHARACTERS = 4_000
_MIN_LETTERS = 0.7
_QUERY_WORDS = range(3, 61)
_MIN_BODY_WORDS = 8
_MAX_BODY_CHARACTERS = 1_500

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'`(\[])|\n")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs|al|resp|Fig|Eq|approx|[A-Z])\.$")
_CODE_STARTS = (">>>", ".. ", "```")
_BARE_HEADING = re.compile(r"(?:Examples?|Usage|References?|Notes?|See Also|Doctests?|Tests)\s*:*", re.IGNORECASE)
_DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # where statements hold statements, in source order
_SPACE, _LETTER = re.compile(r"\s+"), re.compile("[A-Za-z]")
_UNDERLINE = re.compile(r"\s*[-=~^*#\"'+.]{3,}\s*")


@dataclass(frozen=True)
class SourceTree:
    """The Python files of one distribution.

    Args:
        distribution: Normalised name (PEP 503).
        version: Its version; part of the cache's key.
        root: Folder that the files are relative to.
        files: Sorted paths below `root`, with `/`.
    """

    distribution: str
    version: str
    root: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class Docstring:
    """One docstring: where it comes from, and its prose with one paragraph a line."""

    distribution: str
    module: str
    name: str
    text: str


@dataclass(frozen=True)
class DocstringPair:
    """A summary, the text that it summarises, and another text of the same module."""

    query: str
    positive: str
    negative: str
    distribution: str
    module: str


def docstring_pairs(
    split: Split = "train", *, sources: Sequence[SourceTree] | None = None, cache_dir: str | Path | None = None
) -> list[DocstringPair]:
    """Returns (query, positive, negative) rows made from installed docstrings.

    The query is the first sentence, or the summary line where that has no full stop; the positive is the rest of the
    docstring; the negative is the rest of the next docstring of the same module. Docstrings without a body of
    some words, whose body repeats the query, or that are alone in their module are left out, and so are rows whose
    query or body was seen before, in any split. The same installed files give the same rows in the same order.

    All docstrings of a distribution are in one split, given by a hash of its name: about 80 % of the names train,
    10 % validation, 10 % test. networkx, rich and narwhals are test, huggingface-hub, datasets and jinja2 are
    validation; torch, transformers, numpy, scipy, pandas, scikit-learn, sympy, matplotlib and the standard library
    (the distribution `python`) are train. The built-in backbone has seen docstrings of train only.

    Args:
        split: `train`, `validation` or `test`.
        sources: What to read; by default `installed_sources()`.
        cache_dir: Where extracted docstrings are kept, by default `default_cache_dir()`. The first call for an
            environment parses all of its source (about a minute), later calls take about two seconds.

    Raises:
        DataError: If the split is unknown.

    Example:
        >>> pairs = docstring_pairs("test")  # doctest: +SKIP
        >>> pairs[0].query, pairs[0].positive, pairs[0].negative  # doctest: +SKIP
    """
    _check_split(split)
    if sources is None:
        pairs = _installed_pairs(Path(cache_dir or default_cache_dir()))
    else:
        pairs = list(_pairs(_load(sources, cache_dir)))
    return [pair for pair in pairs if split_of(pair.distribution) == split]


def docstrings(
    split: Split = "train", *, sources: Sequence[SourceTree] | None = None, cache_dir: str | Path | None = None
) -> list[Docstring]:
    """Returns whole docstrings, those without a body too, each text once; arguments as in `docstring_pairs`.

    A text that occurs in several splits is kept in test before validation before train, so that no copy of an
    evaluation text is trained on.

    Raises:
        DataError: If the split is unknown.
    """
    _check_split(split)
    return [row for row in _load(sources, cache_dir) if split_of(row.distribution) == split]


def split_of(distribution: str) -> str:
    """Returns the split that all docstrings of a distribution belong to.

    Example:
        >>> split_of("networkx"), split_of("huggingface_hub"), split_of("torch")
        ('test', 'validation', 'train')
    """
    bucket = int(hashlib.sha256(f"{_SALT}:{_normalise(distribution)}".encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def installed_sources() -> list[SourceTree]:
    """Lists the source of the installed distributions and the standard library, sorted by name, without ours.

    Distributions that record no Python files are left out, and so are editable installs, whose files may change while
    their version stays.
    """
    sources = {STANDARD_LIBRARY: _standard_library()}
    for distribution in importlib.metadata.distributions():
        name = _normalise(distribution.name)
        files = tuple(sorted(file.as_posix() for file in distribution.files or () if file.suffix == ".py"))
        if files and name != OWN_DISTRIBUTION and name not in sources:
            sources[name] = SourceTree(name, distribution.version, Path(str(distribution.locate_file(""))), files)
    return [sources[name] for name in sorted(sources)]


def default_cache_dir() -> Path:
    """Returns `$XDG_CACHE_HOME/st_llmpool`, by default `~/.cache/st_llmpool`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st_llmpool"


def extract(source: SourceTree) -> Iterator[Docstring]:
    """Yields the docstrings of a distribution, in the order of its files and of the lines in them.

    Files are parsed, never imported. Those that cannot be read or parsed, tests and vendored copies of other
    distributions are passed over.
    """
    for file in source.files:
        folders = PurePosixPath(file).parts[:-1]
        if _SKIPPED_FOLDERS.isdisjoint(folders) and ".." not in folders:
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name, raw in _raw_docstrings(source.root / file):
                if text := _clean(raw):
                    yield Docstring(source.distribution, module, name, text)


def split_summary(text: str) -> tuple[str, str]:
    r"""Returns the first sentence, or the summary line where it has no full stop, and the rest.

    Example:
        >>> split_summary("Sorts a list, e.g. in reverse. The sort is stable.\nIt needs no memory.")
        ('Sorts a list, e.g. in reverse.', 'The sort is stable.\nIt needs no memory.')
    """
    for end in _SENTENCE_END.finditer(text):
        summary = text[: end.start()]
        if end.group() == "\n" or not _ABBREVIATION.search(summary):
            return summary.strip(), text[end.end() :].strip()
    return text.strip(), ""


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"split={split!r} is not one of {', '.join(SPLITS)}.{nearest(split, SPLITS)}")


def _normalise(distribution: str) -> str:
    """Returns the name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _standard_library() -> SourceTree:
    root = Path(sysconfig.get_path("stdlib"))
    files: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        files += ((Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py"))
    return SourceTree(STANDARD_LIBRARY, sys.version.split()[0], root, tuple(sorted(files)))


def _load(sources: Sequence[SourceTree] | None, cache_dir: str | Path | None) -> list[Docstring]:
    """Returns the docstrings of all splits, from the cache if these sources were read before."""
    sources = installed_sources() if sources is None else sources
    path = Path(cache_dir or default_cache_dir()) / f"docstrings-{_fingerprint(sources)}.jsonl.gz"
    if not path.is_file():
        with _paused_garbage_collector():
            _write_cache(path, _unique(_with_progress(sources)))
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [Docstring(**json.loads(line)) for line in lines]


@cache
def _installed_pairs(cache_dir: Path) -> list[DocstringPair]:
    """Kept for the process, since one evaluation asks several times; packages installed meanwhile are not seen."""
    return list(_pairs(_load(None, cache_dir)))


def _fingerprint(sources: Iterable[SourceTree]) -> str:
    trees = [[source.distribution, source.version, str(source.root), source.files] for source in sources]
    return hashlib.sha256(json.dumps([_CACHE_FORMAT, trees]).encode()).hexdigest()[:16]


def _write_cache(path: Path, rows: Iterable[Docstring]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(path, durable=False) as partial,
        gzip.open(partial, "wt", encoding="utf-8", compresslevel=5) as lines,
    ):
        lines.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


@contextmanager
def _paused_garbage_collector() -> Iterator[None]:
    """Syntax trees make millions of objects without cycles; walking the whole heap for them costs a quarter more."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _with_progress(sources: Sequence[SourceTree]) -> Iterator[SourceTree]:
    """Yields evaluation sources first and shows a bar on a terminal's error stream."""
    from rich.console import Console
    from rich.progress import Progress

    ordered = sorted(sources, key=lambda source: (-SPLITS.index(split_of(source.distribution)), source.distribution))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Reading docstrings", total=sum(len(source.files) for source in sources))
        for source in ordered:
            yield source
            progress.advance(task, len(source.files))


def _unique(sources: Iterable[SourceTree]) -> Iterator[Docstring]:
    """Yields each text once, where it comes first."""
    seen: set[str] = set()
    for source in sources:
        for row in extract(source):
            key = _key(row.text)
            if key not in seen:
                seen.add(key)
                yield row


def _key(text: str) -> str:
    """Returns what two texts that count as the same have in common."""
    return " ".join(text.lower().split())


def _pairs(rows: Iterable[Docstring]) -> Iterator[DocstringPair]:
    """Yields the pairs of all splits; a query or body that occurs again is dropped where it comes later."""
    modules: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    queries: set[str] = set()
    bodies: set[str] = set()
    for row in rows:
        query, body = split_summary(row.text)
        body = _cut(body, _MAX_BODY_CHARACTERS)
        query_key, body_key = _key(query), _key(body)
        if (
            len(query.split()) in _QUERY_WORDS
            and len(body.split()) >= _MIN_BODY_WORDS
            and query_key.rstrip(".!?:") not in body_key
            and query_key not in queries
            and body_key not in bodies
        ):
            queries.add(query_key)
            bodies.add(body_key)
            modules[row.distribution, row.module].append((query, body))
    for (distribution, module), members in modules.items():
        others = [body for _, body in members[1:] + members[:1]]
        for (query, positive), negative in zip(members, others, strict=True):
            if len(members) > 1:
                yield DocstringPair(query, positive, negative, distribution, module)


def _raw_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (qualified name, docstring) in the order of the file; nothing if it does not parse."""
    try:
        code = path.read_bytes()
        if b'"""' not in code and b"'''" not in code:  # no docstring as PEP 257 writes them, and parsing is slow
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(code)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield from _walk(tree, "")


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yields from a node and everything below it, definitions inside `if` and `try` included."""
    if isinstance(node, ast.Module | _DEFINITIONS):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, docstring
    for block in _BLOCKS:
        for child in getattr(node, block, ()):
            yield from _walk(child, f"{name}.{child.name}".lstrip(".") if isinstance(child, _DEFINITIONS) else name)


def _clean(docstring: str) -> str:
    """Returns the prose, one paragraph a line, without doctests, directives and underlines; "" if it is no English."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        prose = takewhile(lambda line: not line.lstrip().startswith(_CODE_STARTS), block.splitlines())
        paragraph = " ".join(" ".join(line for line in prose if not _UNDERLINE.fullmatch(line)).split())
        if paragraph and not _BARE_HEADING.fullmatch(paragraph):
            paragraphs.append(paragraph)
    text = _cut("\n".join(paragraphs), _MAX_TEXT_CHARACTERS)
    return text if _is_english(text) else ""


def _cut(text: str, limit: int) -> str:
    """Returns at most `limit` characters, whole words."""
    return text if len(text) <= limit else text[:limit].rsplit(maxsplit=1)[0]


def _is_english(text: str) -> bool:
    """A cheap test that also drops tables, formulas and code: most visible characters are ASCII letters."""
    visible = _SPACE.sub("", text)
    return len(_LETTER.findall(visible)) >= _MIN_LETTERS * max(len(visible), 1)
