"""Every example in a docstring runs, and everything public has a docstring."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import st_llmpool
from st_llmpool.modules.portable import PortableModule

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def all_modules() -> list[ModuleType]:
    names = [found.name for found in pkgutil.walk_packages(st_llmpool.__path__, "st_llmpool.")]
    return [st_llmpool, *(importlib.import_module(name) for name in names if not name.endswith("__main__"))]


def public_objects(module: ModuleType) -> Iterator[tuple[str, object]]:
    """Yields the classes and functions that `module` defines, named in full."""
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if value.__module__ == module.__name__:
            yield f"{module.__name__}.{name}", value


def examples(module: ModuleType) -> Iterator[doctest.DocTest]:
    """Yields the doctests of the module itself and of what it defines, methods included."""
    known = {**vars(module), "torch": torch}
    yield from doctest.DocTestFinder(recurse=False).find(module, module.__name__, module, known)
    for name, value in public_objects(module):
        yield from doctest.DocTestFinder().find(value, name, module, known)


MODULES = all_modules()
PUBLIC = [found for module in MODULES for found in public_objects(module)]
EXAMPLES = [test for module in MODULES for test in examples(module) if test.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_in_the_docstring_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert results.failed == 0, "".join(report)


@pytest.mark.parametrize(("name", "value"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_everything_public_has_a_docstring(name, value):
    assert value.__doc__, f"{name} has no docstring"
    assert value.__doc__.strip()
    # A dataclass without a docstring gets its signature for one.
    assert not value.__doc__.startswith(f"{name.rpartition('.')[2]}(")


def test_modules_that_are_saved_with_a_model_are_among_the_tested():
    tested = {value for _, value in PUBLIC}
    ours = {value for module in MODULES for value in vars(module).values() if is_portable(value)}
    assert ours
    assert {value for value in ours if not value.__name__.startswith("_")} <= tested


def is_portable(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, PortableModule)
