"""The package as a whole: what importing it costs, and the rules that its files keep."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from transformers.dynamic_module_utils import get_imports

import st_llmpool
import st_llmpool.modules
import st_llmpool.poolings
from st_llmpool.modules.portable import MINIMUM_VERSIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "st_llmpool"
#: Folders whose files travel with a shared model, and the folders that each may import from besides itself.
SHARED = {"modules": set(), "poolings": {"modules"}}
SHARED_FILES = sorted(file for folder in SHARED for file in (PACKAGE / folder).glob("*.py"))
HEAVY = {"torch", "transformers", "sentence_transformers", "numpy", "mteb", "datasets", "peft"}

# Who may import whom, from the bottom up: rooms, and single files of a room that others need earlier. What is not named
# here (the command line, the quickstart) is on top.
STOREYS = [
    {"modules"},
    {"poolings", "attention_proof", "base_tokenizer", "paper_weights", "utils"},
    {"adapters", "fast_inference", "hub.folder_code"},
    {"hub.loading", "summary_cache"},
    {"saved_embedder", "data", "model_card"},
    {"designs"},
    {"losses", "training", "evaluation"},
    {"stats", "analysis"},
    {"study", "hub", "tools", "scale", "serve"},
]


def run_python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_version_is_the_installed_one():
    assert st_llmpool.__version__ == importlib.metadata.version("st-llmpool")


def test_importing_the_package_imports_nothing_heavy():
    loaded = run_python("-c", "import sys, st_llmpool.modules; print(*sys.modules)").split()
    assert HEAVY.isdisjoint(loaded)


def test_help_needs_less_than_a_second():
    def seconds() -> float:
        before = os.times()
        assert "quickstart" in run_python("-m", "st_llmpool", "--help")
        after = os.times()
        # Processor time: the clock on the wall also counts what else the machine is doing.
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(3)) < 1


@pytest.mark.parametrize("name", sorted(st_llmpool.__all__))
def test_every_public_name_is_there(name):
    assert getattr(st_llmpool, name) is not None


def test_every_class_of_a_shared_model_is_there():
    modules = st_llmpool.modules
    assert {getattr(modules, name).__name__ for name in modules.__all__} == set(modules.__all__)


def test_every_pooling_of_ours_is_in_modules_or_poolings():
    ours = {spec.module for spec in st_llmpool.POOLINGS.values() if hasattr(spec.module, "is_st_llmpool_module")}
    names = {name: getattr(st_llmpool.modules, name) for name in st_llmpool.modules.__all__} | vars(st_llmpool.poolings)
    assert len(ours) == 9
    assert ours <= {value for name, value in names.items() if name.endswith("Pooling")}


@pytest.mark.parametrize("package", [st_llmpool, st_llmpool.modules, st_llmpool.poolings])
def test_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


@pytest.mark.parametrize("file", SHARED_FILES, ids=named)
def test_files_of_a_shared_model_import_each_other_in_the_two_forms_that_saving_flattens(file):
    """They are copied, flat, to the root of a repository, where nothing else can be looked up."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            *folder, name = (node.module or "").split(".")
            allowed = [(1, []), *((2, [other]) for other in SHARED[file.parent.name])]
            assert (node.level, folder) in allowed, f"line {node.lineno}: this import does not survive a save"
            assert (PACKAGE / (folder or [file.parent.name])[0] / f"{name}.py").is_file(), f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("st_llmpool"), (
                f"line {node.lineno}: write `from .file import name`"
            )
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("st_llmpool") for alias in node.names), f"line {node.lineno}"


def test_no_two_files_of_a_shared_model_have_one_name():
    names = [file.name for file in SHARED_FILES if file.name != "__init__.py"]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("folder", SHARED)
def test_folders_of_a_shared_model_lie_flat(folder):
    assert [path.name for path in (PACKAGE / folder).iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("file", SHARED_FILES, ids=named)
def test_files_of_a_shared_model_need_only_the_base_install(file):
    """transformers refuses a repository whose code imports, anywhere in a file, a package that is not installed."""
    base = {requirement.name.replace("-", "_") for requirement in base_requirements()}
    brought_by_them = {"tokenizers", "typing_extensions", "huggingface_hub"}
    assert set(get_imports(file)) - set(sys.stdlib_module_names) <= base | brought_by_them


def base_requirements() -> list[Requirement]:
    every = [Requirement(line) for line in importlib.metadata.requires("st-llmpool") or []]
    return [requirement for requirement in every if requirement.marker is None]


def test_a_shared_model_asks_for_the_versions_that_the_package_asks_for():
    claimed = {requirement.name.replace("-", "_"): requirement.specifier for requirement in base_requirements()}
    for library, (specifier, _) in MINIMUM_VERSIONS.items():
        assert specifier in map(str, claimed[library])


def test_the_lowest_versions_that_are_tested_are_those_that_are_claimed():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    for requirement in map(Requirement, claimed):
        lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if lowest:
            assert Version(pins[requirement.name.lower()]) == Version(lowest[0]), requirement.name


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=named)
def test_imports_go_one_way(file):
    own = storey(file.relative_to(PACKAGE).with_suffix("").parts)
    for target in imported_from_package(file):
        assert storey(target) <= own, f"imports {'.'.join(target)}, which is above it"


def storey(path: tuple[str, ...]) -> int:
    """The height of a file, by its own name if that is listed and by its room otherwise."""
    for listed in (".".join(path[:2]), path[0]):
        for height, names in enumerate(STOREYS):
            if listed in names:
                return height
    return len(STOREYS)


def imported_from_package(file: Path) -> set[tuple[str, ...]]:
    """Imports of `file` from the package, inside functions too, such as ``("modules", "attention", "name")``."""
    package = ("st_llmpool", *file.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = node.module.split(".") if node.module else []
            paths = [(*base, *module, alias.name) for alias in node.names]
            found |= {path[1:] for path in paths if path[0] == "st_llmpool" and not path[1].startswith("__")}
    return found


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    machine = re.compile(r"(?<![\w.}])/(work|root|home|Users|opt)/\w")
    kinds = {".py", ".toml", ".yaml", ".yml", ".md", ".txt", ".json", ".cfg", ""}
    names = ("src", "tests", "examples", "scripts", "docs", "benchmarks", "model_cards", ".ci", ".github")
    folders = [ROOT / name for name in names]
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.iterdir())
    found = [
        f"{named(path)}:{number}: {line.strip()[:80]}"
        for path in files
        if path.is_file() and path.suffix in kinds and not {"__pycache__", ".git"} & set(path.parts)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1)
        if machine.search(line)
    ]
    assert found == []


def test_no_two_files_import_each_other_not_even_in_a_circle():
    files = {file.relative_to(PACKAGE).with_suffix("").parts: file for file in PACKAGE.rglob("*.py")}
    files = {(parts[:-1] if parts[-1] == "__init__" else parts): file for parts, file in files.items()}
    imports = {}
    for name, file in files.items():
        found = imported_from_package(file)
        places = (
            next((target[:end] for end in (len(target), len(target) - 1) if target[:end] in files), ())
            for target in found
        )
        imports[name] = {place for place in places if place and place != name}
    order = graphlib.TopologicalSorter(imports)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(".".join(name) for name in error.args[1]))


def test_the_script_of_the_ci_names_tests_that_exist():
    named = re.findall(r"tests/[\w/]+\.py", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert named
    assert [file for file in named if not (ROOT / file).is_file()] == []
