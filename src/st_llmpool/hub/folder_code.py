"""Find all code and references to code in a saved model, and compare them with the package, without running any."""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..modules.errors import __version__
from ..modules.portable import CODE_HEADER, saved_code
from ..modules.seal import MANIFEST

_PACKAGE = Path(__file__).parents[1]
_HEADER = re.compile(re.escape(CODE_HEADER).replace(re.escape(__version__), r"(\d[\w.+-]*)"))

#: Keys under which sentence-transformers looks up a class by its dotted name.
_CLASS_KEYS = {"type", "types", "tokenizer_class", "activation_function", "activation_fn"}
#: Keys on which transformers downloads kernels and peft imports a package, without trust_remote_code.
_UNASKED_KEYS = {"allow_all_kernels", "use_kernels", "kernel_config", "megatron_config"}
#: Keys of code that transformers and peft run with trust_remote_code only.
_ASKED_KEYS = {"auto_map", "custom_pipelines", "parent_library", "trust_remote_code"}
_BASE_KEY = "base_model_name_or_path"
_DOTTED = re.compile(r"\w+(\.\w+)+")
#: ``user/repository--file.Class``, as transformers names a class of another repository.
_ELSEWHERE = re.compile(r"[\w.-]+/[\w.-]+--[\w.]+")
_KERNEL = re.compile(r"_implementation$")
#: Files without any of these are skipped: parsing a large tokenizer.json takes seconds.
_WORTH_READING = re.compile(
    "|".join(sorted(_UNASKED_KEYS | _ASKED_KEYS | _CLASS_KEYS - {"type"} | {_BASE_KEY}))
    + r'|_implementation"|/[\w.-]*--|"type"\s*:\s*"\w+\.'
)
_ESCAPED = re.compile(r"\\u00([0-7][0-9a-fA-F])")
#: Packages in which sentence-transformers looks up classes, and peft the base of an adapter.
_LIBRARIES = ("sentence_transformers.", "torch.nn.")
_PEFT_LIBRARIES = ("transformers.", "sentence_transformers.")


@dataclass(frozen=True)
class FolderCode:
    """The code of a saved model, and of its adapter's base if that is a local folder.

    Attributes:
        own: Class reference, such as ``llm_transformer.LLMTransformer``, to a file identical to the installed
            package's -> import path of the installed class.
        same: Names of files identical to the installed package's.
        foreign: Modules that are not the installed package's.
        unasked: References on which libraries download or import code without trust_remote_code.
        named: References to code that runs with trust_remote_code only; without it, libraries use a class of their own
            or fail.
        idle: Python files that nothing refers to.
    """

    own: dict[str, str] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    unasked: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    @property
    def to_trust(self) -> tuple[str, ...]:
        """Everything that could run and is not in the installed package."""
        return (*self.foreign, *self.unasked, *self.named)


def find_code(folder: Path, *, follow_base: bool = True) -> FolderCode:
    """Search every JSON and Python file of a saved model, at any depth, for code and references to code.

    Args:
        folder: A saved model. Symbolic links are followed, pipes and devices are not opened.
        follow_base: Also search the base of an adapter, if it is a local folder.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text('{"auto_map": {"AutoModel": "evil.Evil"}}')
        ...     find_code(Path(folder)).named
        ("config.json: AutoModel 'evil.Evil'",)
    """
    files = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
    code = {name: file for name, file in files.items() if name.endswith(".py")}
    same = {name: place for name, file in code.items() if (place := _same_in(file, name))}
    changed = {name: _difference(file, name) for name, file in code.items() if name not in same and _installed(name)}
    own, foreign, unasked, named, read = {}, list(changed.values()), [], [], set()
    for name, file in files.items():
        # The seal's keys are file names; no library looks up code there.
        for keys, value in _leaves(file) if name.endswith(".json") and name != MANIFEST else ():
            said = f"{name}: {keys[-1]} {reprlib.repr(value)}"
            if _CLASS_KEYS & {*keys} and _DOTTED.fullmatch(value) and not value.startswith(_LIBRARIES):
                stem, _, attribute = value.partition(".")
                source = f"{stem}.py"
                if source in same and "." not in attribute:
                    own[value] = f"{_PACKAGE.name}.{same[source]}.{value}"
                elif source not in changed:  # already listed
                    foreign.append(said)
                read.add(source)
            elif _UNASKED_KEYS & {*keys} or (any(map(_KERNEL.search, keys)) and "/" in value):
                unasked.append(said)
            elif _ELSEWHERE.search(value) or (_ASKED_KEYS & {*keys} and not value.startswith(_PEFT_LIBRARIES)):
                named.append(said)
            elif keys[-1] == _BASE_KEY and follow_base and Path(value).is_dir():
                base = find_code(Path(value), follow_base=False)
                unasked += [f"{value}/{item}" for item in base.unasked]
                named += [f"{value}/{item}" for item in base.named]
    idle = [name for name in code if name not in {*same, *changed, *read}]
    found = (tuple(dict.fromkeys(items)) for items in (sorted(same), foreign, unasked, named, idle))
    return FolderCode(own, *found)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the regular files below `folder`, following links, each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders.sort()
        yield from (file for name in sorted(names) if (file := Path(place, name)).is_file())


def _installed(name: str) -> Path | None:
    """Return the installed package's module file of that name."""
    files = (_PACKAGE / folder / name for folder in ("modules", "poolings"))
    return next((file for file in files if "/" not in name and name != "__init__.py" and file.is_file()), None)


def _same_in(file: Path, name: str) -> str | None:
    """Return the folder of the installed package with an identical file; None if there is none."""
    installed = _installed(name)
    if installed is None or _HEADER.sub(CODE_HEADER, _text(file), count=1) != saved_code(installed):
        return None
    return installed.parent.name


def _difference(file: Path, name: str) -> str:
    """Describe a file with the name of a module of the package and other content, most often of another version."""
    header = _HEADER.match(_text(file))
    return f"{name} (says st_llmpool {header[1]}, and differs from the installed {__version__})" if header else name


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _leaves(file: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the true and non-empty values of a JSON file as text, each with its path of keys.

    Numbers are skipped: a tokenizer's vocabulary maps every word, and so every key, to one.
    """
    text = _text(file)
    if not _WORTH_READING.search(_ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)):
        return
    try:
        stack: list[tuple[tuple[str, ...], Any]] = [(("",), json.loads(text))]
    except (ValueError, RecursionError):  # no library can load it either
        return
    while stack:
        keys, value = stack.pop()
        if isinstance(value, dict):
            stack.extend(((*keys, key), item) for key, item in reversed(value.items()))
        elif isinstance(value, list):
            stack.extend((keys, item) for item in reversed(value))
        elif value is True or (isinstance(value, str) and value):
            yield keys, str(value)
