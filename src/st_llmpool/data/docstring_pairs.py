"""Retrieval pairs from the docstrings of the packages that are installed on this machine.

Every Python environment holds tens of thousands of summaries next to the texts that they summarise (PEP 257). They are
parsed from source: nothing is imported, nothing downloaded.
"""

from __future__ import annotations

import ast
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
from dataclasses import asdict, dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from ..modules.errors import DataError, nearest
from ..utils.files import atomic_file

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)

# Chosen once, so that what every installation has puts sensible packages into each split: networkx (which torch
# requires), rich and narwhals into test, huggingface-hub and jinja2 into validation, the rest of them into train.
_SALT = "st-llmpool-docstrings-3434"
_CACHE_FORMAT = 1  # raise it when extraction changes, so that old caches are not read
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_vendor", "vendor", "_vendored", "site-packages", "dist-packages", "__pycache__"}
    | {"idlelib", "turtledemo", "ensurepip", "lib2to3"}
)
_MAX_TEXT_CHARACTERS, _MAX_BODY_CHARACTERS = 4_000, 1_500
_MIN_LETTERS = 0.7  # of visible characters: fewer are tables, formulas, code or another language
_QUERY_WORDS, _MIN_BODY_WORDS = range(3, 61), 8

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'`(\[])|\n")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs|al|resp|Fig|Eq|approx|[A-Z])\.$")
_CODE_STARTS = (">>>", ".. ", "```")
_BARE_HEADING = re.compile(r"(?:Examples?|Usage|References?|Notes?|See Also|Doctests?|Tests)\s*:*", re.IGNORECASE)
_UNDERLINE = re.compile(r"\s*[-=~^*#\"'+.]{3,}\s*")
_DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # where statements hold statements, in source order


@dataclass(frozen=True)
class SourceTree:
    """The Python files of one distribution, by its normalised name (PEP 503); sorted paths below `root`, with `/`."""

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
    """Return (query, positive, negative) rows made from installed docstrings.

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
        sources: What to read; by default `installed_sources()`, once per process.
        cache_dir: Where extracted docstrings are kept, by default `$XDG_CACHE_HOME/st_llmpool`. The first call for an
            environment parses all of its source (about a minute), later calls take about two seconds.

    Raises:
        DataError: If the split is unknown.

    Example:
        >>> pairs = docstring_pairs("test")  # doctest: +SKIP
        >>> pairs[0].query, pairs[0].positive, pairs[0].negative  # doctest: +SKIP
    """
    _check_split(split)
    found = _all_pairs(None if sources is None else tuple(sources), cache_dir)
    return [pair for pair in found if split_of(pair.distribution) == split]


def docstrings(
    split: Split = "train", *, sources: Sequence[SourceTree] | None = None, cache_dir: str | Path | None = None
) -> list[Docstring]:
    """Return complete docstrings, those without a body too, each text once; arguments as in `docstring_pairs`.

    A text that occurs in several splits is kept in test before validation before train, so that no copy of an
    evaluation text is trained on.

    Raises:
        DataError: If the split is unknown.
    """
    _check_split(split)
    return [row for row in _load(sources, cache_dir) if split_of(row.distribution) == split]


def split_of(distribution: str) -> str:
    """Return the split that all docstrings of a distribution belong to."""
    bucket = int(hashlib.sha256(f"{_SALT}:{_normalised(distribution)}".encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def installed_sources() -> list[SourceTree]:
    """List the source of the installed distributions and the standard library, sorted by name, without ours.

    Distributions that record no Python files are left out, and so are editable installs, whose files may change while
    their version stays.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    names = sorted(file.as_posix() for file in files if _SKIPPED_FOLDERS.isdisjoint(file.parts[:-1]))
    sources = {"python": SourceTree("python", sys.version.split()[0], library, tuple(names))}
    for distribution in importlib.metadata.distributions():
        name = _normalised(distribution.name)
        names = sorted(file.as_posix() for file in distribution.files or () if file.suffix == ".py")
        if names and name != "st-llmpool" and name not in sources:
            root = Path(str(distribution.locate_file("")))
            sources[name] = SourceTree(name, distribution.version, root, tuple(names))
    return [sources[name] for name in sorted(sources)]


def split_summary(text: str) -> tuple[str, str]:
    r"""Return the first sentence, or the summary line where it has no full stop, and the rest.

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


def _normalised(distribution: str) -> str:
    """Return the name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@cache
def _all_pairs(sources: tuple[SourceTree, ...] | None, cache_dir: str | Path | None) -> list[DocstringPair]:
    """Return the pairs of all splits; a query or body that occurs again is dropped where it comes later."""
    modules: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for row in _load(sources, cache_dir):
        query, body = split_summary(row.text)
        body = _cut(body, _MAX_BODY_CHARACTERS)
        query_key, body_key = _key(query), _key(body)
        keys = {("query", query_key), ("body", body_key)}
        has_size = len(query.split()) in _QUERY_WORDS and len(body.split()) >= _MIN_BODY_WORDS
        if has_size and query_key.rstrip(".!?:") not in body_key and seen.isdisjoint(keys):
            seen |= keys
            modules[row.distribution, row.module].append((query, body))
    return [
        DocstringPair(query, positive, members[(place + 1) % len(members)][1], *module)
        for module, members in modules.items()
        for place, (query, positive) in enumerate(members)
        if len(members) > 1
    ]


def _load(sources: Sequence[SourceTree] | None, cache_dir: str | Path | None) -> list[Docstring]:
    """Return the docstrings of all splits, from the cache if these sources were read before."""
    sources = installed_sources() if sources is None else sources
    trees = [[source.distribution, source.version, str(source.root), source.files] for source in sources]
    fingerprint = hashlib.sha256(json.dumps([_CACHE_FORMAT, trees]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st_llmpool"
    path = Path(cache_dir or folder) / f"docstrings-{fingerprint}.jsonl.gz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=False) as partial, gzip.open(partial, "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(asdict(row)) + "\n" for row in _unique(sources))
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [Docstring(**json.loads(line)) for line in lines]


def _unique(sources: Iterable[SourceTree]) -> Iterator[Docstring]:
    """Yield each text once, of evaluation sources first; show a bar on a terminal's error stream."""
    from rich.console import Console
    from rich.progress import track

    ordered = sorted(sources, key=lambda source: (-SPLITS.index(split_of(source.distribution)), source.distribution))
    seen: set[str] = set()
    for source in track(ordered, "Reading docstrings", console=Console(stderr=True), transient=True):
        for row in _extract(source):
            if (key := _key(row.text)) not in seen:
                seen.add(key)
                yield row


def _key(text: str) -> str:
    """Return what two texts that count as the same have in common."""
    return " ".join(text.lower().split())


def _extract(source: SourceTree) -> Iterator[Docstring]:
    """Yield the docstrings of a distribution; skip tests, vendored copies and what cannot be parsed."""
    for file in source.files:
        folders = PurePosixPath(file).parts[:-1]
        if _SKIPPED_FOLDERS.isdisjoint(folders) and ".." not in folders and (tree := _parsed(source.root / file)):
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name, raw in _walk(tree, ""):
                if text := _prose(raw):
                    yield Docstring(source.distribution, module, name, text)


def _parsed(path: Path) -> ast.Module | None:
    try:
        code = path.read_bytes()
        if b'"""' not in code and b"'''" not in code:  # no docstring as PEP 257 writes them, and parsing is slow
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(code)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield names and docstrings of a node and all below it, definitions inside `if` and `try` included."""
    if isinstance(node, ast.Module | _DEFINITIONS) and (docstring := ast.get_docstring(node, clean=False)):
        yield name, docstring
    for block in _BLOCKS:
        for child in getattr(node, block, ()):
            yield from _walk(child, f"{name}.{child.name}".lstrip(".") if isinstance(child, _DEFINITIONS) else name)


def _prose(docstring: str) -> str:
    """Return the prose, one paragraph a line, without doctests, directives and underlines; "" if it is no English."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        prose = takewhile(lambda line: not line.lstrip().startswith(_CODE_STARTS), block.splitlines())
        paragraph = " ".join(" ".join(line for line in prose if not _UNDERLINE.fullmatch(line)).split())
        if paragraph and not _BARE_HEADING.fullmatch(paragraph):
            paragraphs.append(paragraph)
    text = _cut("\n".join(paragraphs), _MAX_TEXT_CHARACTERS)
    visible = "".join(text.split())
    return text if len(re.findall("[A-Za-z]", visible)) >= _MIN_LETTERS * max(len(visible), 1) else ""


def _cut(text: str, limit: int) -> str:
    """Return at most `limit` characters, complete words."""
    return text if len(text) <= limit else text[:limit].rsplit(maxsplit=1)[0]
