"""Load a saved model without running code of its folder; every command loads models this way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import ORIGINAL_TRANSFORMER_MODELS, import_from_string, load_file_path

from ..modules.errors import ConfigurationError, DataError, StLlmpoolError
from ..modules.seal import check_seal
from ..utils.extras import require
from ..utils.reading import check_no_pipes
from .folder_code import FolderCode, find_code

#: huggingface_hub 2 raises it offline for a cached folder that may lack files; earlier versions return the folder.
_INCOMPLETE: Any = getattr(errors, "IncompleteSnapshotError", ())


def load_model(
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
    device: str | None = None,
    module_classes: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> SentenceTransformer:
    """Load a saved model, with the installed package's code only unless `trust_remote_code` is set.

    sentence-transformers asks for `trust_remote_code` for every module that is not its own. If the folder's code equals
    the installed package's, the installed classes are used instead: no flag is needed, and no code of the folder runs.

    Args:
        model: Folder or Hub id of a saved model, or of a language model.
        trust_remote_code: Run the code of the folder or repository.
        revision: Branch, tag or commit of a Hub model.
        token: Hub token.
        device: Device to load the model on.
        module_classes: Replacement classes (anything with their ``load``) by their reference in ``modules.json``.
        **kwargs: Passed to ``SentenceTransformer``.

    Raises:
        ConfigurationError: If it needs code that is not the installed package's and `trust_remote_code` is not set.
        DataError: If it cannot be loaded.

    Example:
        >>> load_model("runs/mine/model").encode("a text").shape  # doctest: +SKIP
        (1024,)
    """
    name = str(model)
    options: dict[str, Any] = {"token": token, "device": device, **kwargs}
    if os.path.isdir(name):
        check_no_pipes(Path(name))
    if trust_remote_code:
        with checked_code(name, None):
            _check_adapter(name, token=token, revision=revision)
            if load_file_path(name, "modules.json", token=token, revision=revision) is None:  # no module checks it
                check_seal(name, token=token, revision=revision)
            return SentenceTransformer._load_with_module_classes(
                name, module_classes or {}, trust_remote_code=True, revision=revision, **options
            )
    folder, revision = _code_of(name, revision, token)
    if not any((folder / file).is_file() for file in ("modules.json", "config.json", "adapter_config.json")):
        raise DataError(f"{name} is not a saved model: it has neither modules.json nor config.json.")
    _check_adapter(str(folder))
    with checked_code(name, folder) as code:
        if not code.own:  # our own modules check it
            check_seal(name, revision=revision, token=token)
        return _load_with_classes(name, code.own, module_classes or {}, revision=revision, **options)


def _check_adapter(name: str, **hub: Any) -> None:
    if load_file_path(name, "adapter_config.json", **hub) is not None:
        require("train", "peft", purpose=f"{name} is an adapter, which")


def check_code(
    model: str | Path, *, trust_remote_code: bool = False, revision: str | None = None, token: str | None = None
) -> None:
    """Raise what :func:`load_model` raises for untrusted code; to be called before data are read."""
    if not trust_remote_code:
        code = find_code(_code_of(str(model), revision, token)[0])
        if code.foreign or code.unasked:
            raise foreign_code_error(str(model), code)


@contextmanager
def checked_code(name: str, folder: Path | None) -> Iterator[FolderCode]:
    """Refuse untrusted code before a load inside the block, and re-raises library errors as a one-line `DataError`.

    Args:
        name: Name of the model in messages.
        folder: The model's files; None if its code is trusted.

    Raises:
        ConfigurationError: If loading needs code that is not the installed package's.
        DataError: If loading fails.
    """
    code = FolderCode() if folder is None else find_code(folder)
    if code.foreign or code.unasked:
        raise foreign_code_error(name, code)
    try:
        yield code
    except Exception as error:  # many libraries raise here
        if code.named and "trust_remote_code" in str(error):
            raise foreign_code_error(name, code) from error
        if isinstance(error, StLlmpoolError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} cannot be loaded: {reason[:500]}") from error


def foreign_code_error(name: str, code: FolderCode) -> ConfigurationError:
    """Return the error for a model that needs untrusted code.

    Args:
        name: Folder or Hub id.
        code: The code found there.
    """
    return ConfigurationError(
        f"{name} needs code that is not the installed st_llmpool's: {'; '.join(code.to_trust)}. Review it, then allow "
        f"it with --trust-remote-code (trust_remote_code in Python and in recipes)."
    )


def _load_with_classes(
    name: str, classes: dict[str, str], others: Mapping[str, Any], **options: Any
) -> SentenceTransformer:
    """Load a model with given classes, through a private method of sentence-transformers 6.2.

    Args:
        name: Folder or Hub id.
        classes: Reference in the model's files -> import path of the class.
        others: Reference -> class; these take precedence.
        **options: Passed to ``SentenceTransformer``.
    """
    installed = {reference: import_from_string(path) for reference, path in classes.items()}
    for reference, found in installed.items():
        if not getattr(found, "is_st_llmpool_module", False):
            raise DataError(
                f"{name} lists {reference} as a module, but it is not one. Save or download the model again."
            )
    return SentenceTransformer._load_with_module_classes(
        name, {**installed, **others}, trust_remote_code=False, **options
    )


def _code_of(name: str, revision: str | None, token: str | None) -> tuple[Path, str | None]:
    """Return a folder with all JSON and Python files of a model, and their commit."""
    if os.path.isdir(name):
        return Path(name), revision
    if "/" not in name and name.lower() not in ORIGINAL_TRANSFORMER_MODELS:  # as sentence-transformers does
        name = f"{SentenceTransformer.default_huggingface_organization}/{name}"
    try:
        folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=["*.json", "*.py"]))
    except _INCOMPLETE as error:  # offline: missing files cannot be loaded either
        folder = Path(error.snapshot_path)
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name} is neither a folder nor a readable model on the Hub: {reason[:300]}") from error
    return folder, folder.name
