"""Portable saving: every save also writes the module code that the model needs to load anywhere.

sentence-transformers looks up a class that is not its own as ``file.Class`` at the root of the repository and never
copies an installed package's code there.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.normalize import Normalize
from torch import nn

from .errors import ConfigurationError, DataError, StLlmpoolError, __version__, of_package
from .seal import MANIFEST, begin_save, times_of_files, write_seal, write_text

logger = logging.getLogger(__name__)

CODE_HEADER = f"# Part of st_llmpool {__version__} (Apache-2.0), copied here so that this model loads without it.\n"
#: Oldest usable libraries, and why.
MINIMUM_VERSIONS = {
    "transformers": (">=5.11", "older versions miss parts of this model's code, and 5.2 loads adapters at random"),
    "sentence_transformers": (">=6.2", "6.0 weights tokens wrongly where a batch is padded on the left"),
}
LOCATION = ("token", "cache_folder", "revision", "local_files_only")
# `from .x import` and `from ..folder.x import`
_RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)\.(?:\.(\w+)\.)?([^\s.]\S*)(\s+import\b)", re.MULTILINE)


class PortableModule(Module):
    """Base of the modules in this folder: safetensors weights, and the source code in every saved model.

    A subclass declares ``config_keys`` as every sentence-transformers module does; its constructor takes them by name.
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
        """Read what :meth:`save` wrote; DataError if it is missing, damaged, newer than this code, or does not fit."""
        where = {key: kwargs[key] for key in ("subfolder", *LOCATION) if key in kwargs}
        folder = f"{model_name_or_path}/{kwargs.get('subfolder', '')}".rstrip("/")
        with naming(f"{folder}/{cls.config_file_name}", TypeError, ValueError, OSError, RecursionError):
            module = cls(**cls.load_config(model_name_or_path, **where))
        if next(module.parameters(), None) is None:
            return module
        with naming(f"{folder}/model.safetensors", SafetensorError, RuntimeError, ValueError, OSError):
            return cls.load_torch_weights(model_name_or_path, model=module, **where)


class SavedModuleName(str):
    """A class's true ``__module__``, of which sentence-transformers' save writes the file alone into modules.json."""

    def __format__(self, spec: str) -> str:
        return format(str(self).rpartition(".")[2], spec)

    def startswith(self, prefix: Any, *place: Any) -> bool:
        """Return False for ``"transformers_modules."``, whose code the save would copy a second time."""
        return prefix != "transformers_modules." and super().startswith(prefix, *place)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


class SealedSentenceTransformer(SentenceTransformer):
    """A ``SentenceTransformer`` whose saves are sealed and whose cut vectors and token embeddings are right.

    Only the model can seal: it writes ``modules.json`` and the card after the modules' own ``save``.
    """

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Save as the base class does, then write the seal; a save that is interrupted leaves what does not load."""
        if path is None:
            return
        root = Path(path)
        begin_save(root, self)
        if package := of_package("model_card.identity"):
            package.copy_assets(self, root)
        others = times_of_files(root) | {"modules.json": 0}
        super().save(path, *args, **kwargs)
        write_seal(root, self, [name for name, time in times_of_files(root).items() if others.get(name) != time])
        # A fast tokenizer keeps how it cut and padded its last texts, and a trainer saves it once more.
        forget_last_call(self.tokenizer)

    def _get_model_config(self) -> dict[str, Any]:
        libraries = {library: {"specifier": at, "reason": why} for library, (at, why) in MINIMUM_VERSIONS.items()}
        return super()._get_model_config() | {"requirements": libraries, "sealed": MANIFEST}

    def _inference(self, inputs: list, *, truncate_dim: int | None = None, **kwargs: Any) -> Any:
        """Mend what inference returns: vectors that were cut after they were normalised, and tokens of left padding."""
        if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
            raise ConfigurationError(f"truncate_dim={truncate_dim!r} must be a positive integer.")
        if cut := truncate_dim is not None and isinstance(self[-1], Normalize):
            kwargs["normalize_embeddings"] = True
        if of_tokens := kwargs.get("output_value") == "token_embeddings":
            kwargs["output_value"] = None
        found = super()._inference(inputs, truncate_dim=truncate_dim, **kwargs)
        if of_tokens:
            return [item["token_embeddings"][item["attention_mask"].bool()] for item in found]
        if cut and kwargs.get("output_value", "") is None:
            for item in found:
                item["sentence_embedding"] = nn.functional.normalize(item["sentence_embedding"], dim=-1)
        return found


# Cards and messages of sentence-transformers print the name of the model's class; pickle goes by __qualname__.
SealedSentenceTransformer.__name__ = SentenceTransformer.__name__


def complete_model(model: SentenceTransformer) -> None:
    """Seal the saves of a model that is ready, and name it by its weights; a user's own class stays as it is."""
    if type(model) is SentenceTransformer:
        model.__class__ = SealedSentenceTransformer
    if identity := of_package("model_card.identity"):
        identity.identify_card(model.model_card_data)


def forget_last_call(tokenizer: Any) -> None:
    """Clear the truncation and padding of the last call, which a fast tokenizer keeps and would save."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()


@contextmanager
def naming(file: str, *kinds: type[Exception]) -> Iterator[None]:
    """Re-raise library errors of the given `kinds` about an unreadable `file` as a `DataError` that names it."""
    try:
        yield
    except kinds as error:
        if isinstance(error, StLlmpoolError):
            raise
        newer = " It may come from a newer st_llmpool: update." if "unexpected keyword" in str(error) else ""
        reason = f"{str(error).rstrip('.')}.{newer}"
        raise DataError(f"{file} cannot be used: {reason} Save or download the model again.") from error


def save_source_files(module_class: type[nn.Module], root: Path) -> None:
    """Write the file that defines a class, and every file that it needs, flat into the `root` of a saved model."""
    if module_class.__module__ == "__main__":
        words = "%s is defined in a script or notebook, so its code is not saved. Move it into a file and import it."
        logger.warning(words, module_class.__name__)
        return
    for file in code_files(Path(inspect.getfile(module_class))):
        write_text(root / file.name, saved_code(file))


def code_files(source: Path) -> list[Path]:
    """Return `source` and every file that it needs, by ``from .x import`` or ``from ..folder.x import``."""
    found = [source]
    for file in found:  # grows while it is read
        for _, folder, name, _ in _RELATIVE_IMPORT.findall(file.read_text(encoding="utf-8")):
            needed = (file.parents[1] / folder if folder else file.parent) / f"{name}.py"
            found += [needed] if needed not in found else []
    return found


def saved_code(file: Path) -> str:
    """Return a code file as a saved model holds it: imports flat, and our own files under a line of their version."""
    text = _RELATIVE_IMPORT.sub(r"\1.\3\4", file.read_text(encoding="utf-8"))
    is_ours = __package__ == "st_llmpool.modules" and Path(__file__).parents[1] in file.parents
    return CODE_HEADER + text if is_ours else text
