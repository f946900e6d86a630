"""Portable saving: every save also writes the module code that the model needs to load anywhere, and names it uniquely.

sentence-transformers looks up a class that is not its own as ``file.Class`` at the root of the repository and never
copies an installed package's code there. The base class here does so inside ``save`` itself, so that
``save_pretrained``, ``push_to_hub`` and trainer checkpoints need no special call.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from sentence_transformers.util import load_dir_path
from torch import nn

from .errors import DataError, StLlmpoolError, __version__
from .seal import MANIFEST, write_text

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

    modules.json names a subclass by its file alone (``multi_layer_pooling.MultiLayerPooling``), which is what
    sentence-transformers can look up in a repository; see :class:`SavedModuleName`.

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

    #: Recognises our modules whether they came from the package or from a repository's copy of it.
    is_st_llmpool_module: ClassVar[bool] = True
    config_keys: list[str] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__module__ = SavedModuleName(cls.__module__)

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Write config, weights (safetensors, whatever the caller asks) and the needed source files."""
        self.save_config(output_path)
        if next(self.parameters(), None) is not None:
            self.save_torch_weights(output_path, safe_serialization=True)
        save_source_files(type(self), Path(output_path).resolve().parent)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Read what :meth:`save` wrote from a folder or the Hub; `kwargs` say where, the rest is for other modules.

        Raises:
            DataError: If config or weights are missing, damaged, from a newer version, or do not fit each other.
        """
        location = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {key: kwargs[key] for key in location if key in kwargs}
        folder = f"{model_name_or_path}/{kwargs.get('subfolder', '')}".rstrip("/")
        with naming(f"{folder}/{cls.config_file_name}", TypeError, ValueError, OSError, RecursionError):
            module = cls(**cls.load_config(model_name_or_path, **where))
        if next(module.parameters(), None) is None:
            return module
        with naming(f"{folder}/model.safetensors", SafetensorError, RuntimeError, ValueError, OSError):
            return cls.load_torch_weights(model_name_or_path, model=module, **where)


class SavedModuleName(str):
    """A class's true ``__module__``, which sentence-transformers' save turns into the name of its file.

    The save writes ``f"{__module__}.{name}"`` into modules.json. It also copies the code of classes whose module starts
    with ``transformers_modules.`` into their folders, though :class:`PortableModule` has put it at the root already.

    Example:
        >>> name = SavedModuleName("st_llmpool.modules.multi_layer_pooling")
        >>> name == "st_llmpool.modules.multi_layer_pooling", f"{name}.MultiLayerPooling"
        (True, 'multi_layer_pooling.MultiLayerPooling')
    """

    def __format__(self, spec: str) -> str:
        return format(str(self).rpartition(".")[2], spec)

    def startswith(self, prefix: Any, *place: Any) -> bool:
        """Return False for ``"transformers_modules."``, which the save asks for."""
        return prefix != "transformers_modules." and super().startswith(prefix, *place)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


@contextmanager
def naming(file: str, *kinds: type[Exception]) -> Iterator[None]:
    """Re-raise library errors of the given `kinds` about an unreadable `file` as a `DataError` that names it."""
    try:
        yield
    except kinds as error:
        if isinstance(error, StLlmpoolError):
            raise
        newer = " It may come from a newer st_llmpool: update." if "unexpected keyword" in str(error) else ""
        words = str(error).rstrip(".")
        raise DataError(f"{file} cannot be used: {words}.{newer} Save or download the model again.") from error


def save_source_files(module_class: type[nn.Module], root: Path) -> None:
    """Write the file that defines a class, and every file that it needs, flat into the `root` of a saved model."""
    if module_class.__module__ == "__main__":
        logger.warning(
            "%s is defined in a script or notebook, so the saved model lacks its code and loads only there. "
            "Move the class into a file of its own and import it.",
            module_class.__name__,
        )
        return
    for file in code_files_of(module_class):
        write_text(root / file.name, saved_code(file))


def code_files_of(module_class: type[nn.Module]) -> list[Path]:
    """Return the files that a class of a saved model needs; none if it is not one of ours."""
    is_portable = hasattr(module_class, "is_st_llmpool_module")
    return code_files(Path(inspect.getfile(module_class))) if is_portable else []


def code_files(source: Path) -> list[Path]:
    """Return `source` and every file that it needs, by ``from .x import`` or ``from ..folder.x import``."""
    found = [source]
    for file in found:  # grows while it is read
        for _, folder, name, _ in _RELATIVE_IMPORT.findall(file.read_text(encoding="utf-8")):
            needed = (file.parents[1] / folder if folder else file.parent) / f"{name}.py"
            if needed not in found:
                found.append(needed)
    return found


def saved_code(file: Path) -> str:
    """Return a code file as a saved model holds it: imports flat, and our own files under a line of their version."""
    text = _RELATIVE_IMPORT.sub(r"\1.\3\4", file.read_text(encoding="utf-8"))
    is_ours = __package__ == "st_llmpool.modules" and Path(__file__).parents[1] in file.parents
    return CODE_HEADER + text if is_ours else text


def copy_assets(model_name_or_path: str, root: Path, **where: Any) -> None:
    """Copy the card's pictures when a loaded model is saved again: sentence-transformers keeps its text only."""
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
    """Write the oldest usable library versions, which sentence-transformers reads at load but never writes."""
    file = root / "config_sentence_transformers.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    config["requirements"] = {
        library: {"specifier": specifier, "reason": reason} for library, (specifier, reason) in MINIMUM_VERSIONS.items()
    }
    config["sealed"] = MANIFEST  # so that a folder that lost its manifest is not taken for one that had none
    write_text(file, json.dumps(config, indent=2, sort_keys=True))


class IdentifiedCardData(SentenceTransformerModelCardData):
    """Card data whose ``model_name`` is unique to the weights, since mteb files results under it.

    None for a model as it was loaded from the Hub (mteb then takes id and commit), else
    ``local/<name>-<fingerprint>``, computed when asked for, as training changes it. The card keeps the plain name.
    """

    _from_hub = _writing_card = False

    @property
    def model_name(self) -> str | None:
        """The unique name."""
        title: str | None = self.__dict__.get("model_name")
        if self._writing_card or getattr(self, "model", None) is None:
            return title
        if self._from_hub and "generated_from_trainer" not in self.tags:
            return None
        slug = re.sub(r"[^\w.-]+", "-", title or "unnamed").strip("-.")
        return f"local/{slug}-{fingerprint(self.model)[:12]}"

    @model_name.setter
    def model_name(self, title: str | None) -> None:
        self.__dict__["model_name"] = title

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the card."""
        self._writing_card = True
        try:
            return super().to_dict()
        finally:
            self._writing_card = False


def identify_by_weights(model: SentenceTransformer) -> None:
    """Give the plain card data of a model that is ready the unique name; other card data stay as they are."""
    card = model.model_card_data
    if type(card) is SentenceTransformerModelCardData:
        card.__class__ = IdentifiedCardData
    if isinstance(card, IdentifiedCardData):
        card._from_hub = bool(card.base_model_revision) and not Path(str(card.base_model)).exists()


def fingerprint(model: SentenceTransformer) -> str:
    """Return a hash of all that the vectors depend on: weights, module settings, tokenizer, prompts."""
    settings: list[Any] = [model.prompts, model.default_prompt_name, model.truncate_dim, model.similarity_fn_name]
    settings += [model.max_seq_length, _tokenizer_settings(model.tokenizer)]
    settings += [[type(module).__name__, module.get_config_dict()] for module in model]
    settings += [_without_places(module.config) for module in model.modules() if hasattr(module, "config")]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):  # loading may register them in another order
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:40]


def _tokenizer_settings(tokenizer: Any) -> object:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return repr(tokenizer)
    last_call = ("truncation", "padding")  # left over from it
    state = {key: value for key, value in json.loads(backend.to_str()).items() if key not in last_call}
    return [state, getattr(tokenizer, "padding_side", None), getattr(tokenizer, "truncation_side", None)]


def _without_places(config: Any) -> object:
    if not hasattr(config, "to_dict"):
        return str(config)
    where_and_when = ("_name_or_path", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in where_and_when}
