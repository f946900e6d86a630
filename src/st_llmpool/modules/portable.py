"""Portable saving: every plain save also writes the module code that the model needs to load anywhere.

sentence-transformers looks up a class that is not its own as ``file.Class`` at the root of the repository
and never copies the code of an installed package there, so a saved model would only load beside
st_llmpool. The base class here closes that gap inside ``save`` itself: ``save_pretrained``,
``push_to_hub`` and trainer checkpoints need no special call.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from sentence_transformers.base.modules.module import Module
from sentence_transformers.util import load_dir_path
from torch import nn

from .errors import DataError, StLlmpoolError
from .seal import MANIFEST, write_text
from .version import __version__

logger = logging.getLogger(__name__)

CODE_HEADER = f"# Part of st_llmpool {__version__} (Apache-2.0), copied here so that this model loads without it.\n"

#: ``from .x import`` and ``from ..folder.x import``.
_RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)\.(?:\.(\w+)\.)?([^\s.]\S*)(\s+import\b)", re.MULTILINE)

MINIMUM_VERSIONS = {
    "transformers": (
        ">=5.11",
        "older versions miss parts of this model's code, and 5.2 loads adapters as random weights",
    ),
    "sentence_transformers": (">=6.2", "6.0 weights tokens wrongly where a batch is padded on the left"),
}


class PortableModule(Module):
    """Base of the modules in this folder: safetensors weights, and source code beside every saved model.

    A subclass declares ``config_keys`` as every sentence-transformers module does; its constructor takes
    them by name.

    Subclasses get a one-part ``__module__`` (``multi_layer_pooling``, not
    ``st_llmpool.modules.multi_layer_pooling``), because that is what sentence-transformers writes into
    modules.json and what it can look up in a repository. ``import_path`` keeps the real one, for pickling.

    Example:
        >>> class DoublePooling(PortableModule):
        ...     config_keys = ["factor"]
        ...     def __init__(self, factor: float = 2.0) -> None:
        ...         super().__init__()
        ...         self.factor = factor
        ...     def forward(self, features):
        ...         features["sentence_embedding"] = features["readout"] * self.factor
        ...         return features
        >>> DoublePooling(3.0).get_config_dict()
        {'factor': 3.0}
    """

    import_path: ClassVar[str] = __name__
    #: Recognises our modules whether they came from the package or from a repository's copy of it.
    is_st_llmpool_module: ClassVar[bool] = True
    config_keys: list[str] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.import_path = cls.__module__
        cls.__module__ = cls.__module__.rpartition(".")[2]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles by ``import_path``: ``__module__`` names a file of a repository, not an importable module."""
        return _new_instance, (type(self).import_path, type(self).__qualname__), self.__getstate__()

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Writes config, weights (safetensors, whatever the caller asks) and the needed source files.

        Args:
            output_path: The module's own folder, ``<model>/<index>_<Class>``.
            *args: Ignored; for the interface.
            **kwargs: Ignored; ``safe_serialization=False`` too, since a pickle runs code when it is loaded.
        """
        self.save_config(output_path)
        if next(self.parameters(), None) is not None:
            self.save_torch_weights(output_path, safe_serialization=True)
        save_source_files(type(self), Path(output_path).resolve().parent)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Reads what :meth:`save` wrote, from a folder or from the Hub.

        Args:
            model_name_or_path: Folder or Hub id of the whole model.
            **kwargs: Where to look: ``subfolder``, ``token``, ``cache_folder``, ``revision``,
                ``local_files_only``. The rest is for other modules and ignored.

        Raises:
            DataError: If config or weights are missing, damaged, from a newer version, or do not fit each other.
        """
        location = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {key: kwargs[key] for key in location if key in kwargs}
        folder = f"{model_name_or_path}/{kwargs.get('subfolder', '')}".rstrip("/")
        with naming(f"{folder}/{cls.config_file_name}", TypeError, ValueError, OSError):
            module = cls(**cls.load_config(model_name_or_path, **where))
        if next(module.parameters(), None) is None:
            return module
        with naming(f"{folder}/model.safetensors", SafetensorError, RuntimeError, ValueError, OSError):
            return cls.load_torch_weights(model_name_or_path, model=module, **where)


@contextmanager
def naming(file: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns what libraries raise over an unusable file into an error that names it.

    Args:
        file: File or folder that is read inside.
        *kinds: Errors that mean that it is unusable; ours pass as they are.

    Raises:
        DataError: If it is missing, damaged or does not fit, with the library's own words.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, StLlmpoolError):
            raise
        newer = " It may come from a newer st_llmpool: update." if "unexpected keyword" in str(error) else ""
        words = str(error).rstrip(".")
        raise DataError(f"{file} cannot be used: {words}.{newer} Save or download the model again.") from error


def save_source_files(module_class: type[nn.Module], root: Path) -> None:
    """Writes the file that defines `module_class`, and every file that it needs, flat into `root`.

    Args:
        module_class: A class whose file imports its neighbours as :func:`code_files` says.
        root: Root of the saved model.
    """
    import_path: str = module_class.import_path  # type: ignore[attr-defined]
    if import_path == "__main__":
        logger.warning(
            "%s is defined in a script or notebook, so the saved model lacks its code and loads only there. "
            "Move the class into a file of its own and import it.",
            module_class.__name__,
        )
        return
    for file in code_files(Path(inspect.getfile(sys.modules[import_path]))):
        write_text(root / file.name, saved_code(file))


def code_files(source: Path) -> list[Path]:
    """Returns `source` and every file that it needs, directly or not.

    Args:
        source: A file that imports its neighbours by ``from .x import y``, or ``from ..folder.x import y`` if they lie
            in a folder next to its own.
    """
    found = [source]
    for file in found:  # grows while it is read
        for _, folder, name, _ in _RELATIVE_IMPORT.findall(file.read_text(encoding="utf-8")):
            needed = (file.parents[1] / folder if folder else file.parent) / f"{name}.py"
            if needed not in found:
                found.append(needed)
    return found


def saved_code(file: Path) -> str:
    """Returns what a saved model holds for a code file: every import flat, since a repository has no folders of code.

    Files of st_llmpool also get a line that names their version; a repository's copy of them has it already.
    """
    text = _RELATIVE_IMPORT.sub(r"\1.\3\4", file.read_text(encoding="utf-8"))
    is_ours = __package__ == "st_llmpool.modules" and Path(__file__).parents[1] in file.parents
    return CODE_HEADER + text if is_ours else text


def copy_assets(model_name_or_path: str, root: Path, **where: Any) -> None:
    """Takes the card's pictures along when a loaded model is saved: sentence-transformers keeps its text only.

    Args:
        model_name_or_path: Where the model was loaded from.
        root: Root of the saved model; pictures that it has already are kept.
        **where: ``token``, ``cache_folder``, ``revision`` and ``local_files_only`` of the load.
    """
    try:
        source = load_dir_path(model_name_or_path, subfolder="assets", **where)
    except Exception as error:  # pictures are worth no failed save, whatever the Hub says
        logger.warning("The pictures of the card of %s could not be copied: %s", model_name_or_path, error)
        return
    if source is not None and Path(source).is_dir() and Path(source).resolve() != (root / "assets").resolve():
        for file in Path(source).iterdir():
            if file.is_file() and not (root / "assets" / file.name).exists():
                (root / "assets").mkdir(exist_ok=True)
                shutil.copyfile(file, root / "assets" / file.name)


def save_requirements(root: Path) -> None:
    """Adds the oldest usable library versions to the saved model, so that older ones refuse it by name.

    sentence-transformers reads ``requirements`` at load but never writes it.

    Args:
        root: Root of the saved model; nothing happens if it has no ``config_sentence_transformers.json``.
    """
    file = root / "config_sentence_transformers.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    config["requirements"] = {
        library: {"specifier": specifier, "reason": reason} for library, (specifier, reason) in MINIMUM_VERSIONS.items()
    }
    config["sealed"] = MANIFEST  # so that a folder that lost its manifest is not taken for one that had none
    write_text(file, json.dumps(config, indent=2, sort_keys=True))


def _new_instance(import_path: str, name: str) -> nn.Module:
    """Makes an empty instance of a class found by its real module; pickle fills in the state."""
    __import__(import_path)
    module_class = getattr(sys.modules[import_path], name)
    return module_class.__new__(module_class)
