"""Compare a saved model with its seal: every file by its hash, files that were added, and the probe vectors."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_import_files

from ..modules.attention import why_no_forward
from ..modules.errors import __version__
from ..modules.seal import MANIFEST, Difference, differences, read_manifest, write_seal
from ..utils.files import reraise_as_write_error
from ..utils.random_state import preserve_modes

logger = logging.getLogger(__name__)

Status = Literal["ok", "warning", "failed", "skipped"]

#: Texts whose vectors are recorded.
PROBES = (
    "a cat",
    "Interest rates rose for the third time this year, said the bank.",
    "def mean(values): return sum(values) / len(values)",
)

#: The checks of :func:`seal_findings`.
SEAL_CHECKS = ("seal", "files added", "code added")

# Files that loaders read at the root of a model, besides code.
_READ_BY_LOADERS = (
    *("*.safetensors", "*.safetensors.index.json", "config*.json", "*_config.json", "modules.json"),
    *("tokenizer*", "added_tokens.json", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja"),
)
_WAY_OUT = "Save or download the model again; if the change is intended, seal it with `st-llmpool doctor --seal`."


@dataclass(frozen=True)
class Finding:
    """The result of one check, a row of the doctor's table.

    Attributes:
        check: Name of the check.
        status: ``"ok"``, ``"warning"``, ``"failed"`` or ``"skipped"``.
        detail: What was found and, if it is not ok, what to do.
    """

    check: str
    status: Status
    detail: str


def seal_findings(folder: Path) -> Iterator[Finding]:
    """Compare every sealed file with its hash and name added files, without running any."""
    manifest = read_manifest(folder)
    files = manifest.get("files")
    if not files:
        yield _unsealed(folder)
        return
    found = list(differences(folder, files))
    written = f"written by st_llmpool {manifest.get('version')}, installed is {__version__}"
    if found:
        yield Finding("seal", "failed", f"{'; '.join(map(str, found))}. {_WAY_OUT} ({written})")
        return
    yield Finding("seal", "ok", f"{len(files)} files unchanged since they were saved; {written}")
    if added := [name for name in files_to_seal(folder) if name not in files]:
        yield Finding("files added", "failed", f"{', '.join(added)} may change what is loaded. Remove them. {_WAY_OUT}")
    if code := sorted(file.name for file in folder.glob("*.py") if file.name not in {*files, *added}):
        yield Finding("code added", "warning", f"{', '.join(code)}: not part of the saved model, which never runs it")


def probe_finding(folder: Path, model: SentenceTransformer) -> Finding:
    """Compare the vectors of the probe texts with those recorded in the seal."""
    recorded = read_manifest(folder).get("probes", {})
    if "vectors" not in recorded:
        return Finding("probe vectors", "skipped", recorded.get("skipped", "the model is not sealed"))
    expected = torch.tensor([[float(value) for value in row.split()] for row in recorded["vectors"]]).double()
    found = probe_vectors(model)
    if found.shape != expected.shape:
        return Finding("probe vectors", "failed", f"{tuple(found.shape)} numbers instead of {tuple(expected.shape)}")
    worst = ((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)).max().item()
    same_device = model.device.type == recorded["device"]
    exact = {recorded["dtype"], str(model.dtype).removeprefix("torch.")} == {"float32"}
    limit = (1e-4 if same_device else 1e-3) if exact else 5e-2
    detail = f"largest relative difference {worst:.1e}, limit {limit:.0e}"
    if not worst <= limit:  # also for NaN
        return Finding("probe vectors", "failed", f"{detail}: the weights, the base or a library changed. {_WAY_OUT}")
    return Finding("probe vectors", "ok", detail)


def probe_record(model: SentenceTransformer) -> dict[str, Any]:
    """Return what the seal records of the probe texts: vectors, dtype and device, or why there are none.

    The module code of a saved model calls this by name wherever the package is installed.
    """
    record: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    if reason := why_no_forward(model):
        return record | {"skipped": reason}
    try:
        vectors = probe_vectors(model)
    except Exception as error:  # a trained model is worth more than its probe vectors
        logger.warning("The seal has no probe vectors, which could not be computed.", exc_info=True)
        return record | {"skipped": f"{type(error).__name__}: {error}"}
    return record | {"vectors": [" ".join(f"{value:.7g}" for value in row) for row in vectors.tolist()]}


def probe_vectors(model: SentenceTransformer) -> Tensor:
    """Return 32 projections of the probe texts' vectors (6, 32), in one batch and one by one; `model` is unchanged."""
    with preserve_modes(model):
        batches = [model.preprocess(list(texts)) for texts in (PROBES, *([text] for text in PROBES))]
        vectors = [model(batch_to_device(batch, model.device))["sentence_embedding"] for batch in batches]
    stacked = torch.cat(vectors).double().cpu()
    dimensions, columns = torch.arange(1, stacked.shape[1] + 1).double(), torch.arange(1, 33).double()
    return stacked @ (torch.outer(dimensions, columns) * 2.399963).cos() * (2 / len(dimensions)) ** 0.5


def files_to_seal(root: Path) -> list[str]:
    """Return the files of a saved model that decide its vectors, as paths below `root`.

    These are what loaders read at the root, the modules' folders, and the code that is named in `modules.json` or an
    `auto_map`; a file that somebody else put there is not among them.
    """
    modules = json.loads((root / "modules.json").read_text(encoding="utf-8"))
    references = [module["type"] for module in modules]
    for config in map(_read_json_or_empty, root.glob("*config.json")):
        references += _strings(config.get("auto_map"))
    code = [file for name in references if (file := root / f"{name.partition('.')[0]}.py").is_file()]
    code += [root / Path(str(needed)).name for file in code for needed in get_relative_import_files(str(file))]
    folders = [root / module["path"] for module in modules if module["path"]]
    read = [file for pattern in _READ_BY_LOADERS for file in root.glob(pattern)]
    files = [*read, *code, *(file for folder in folders for file in folder.rglob("*"))]
    names = {file.relative_to(root).as_posix() for file in files if file.is_file()}
    return sorted(name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts))


@contextmanager
def replacing_seal(folder: Path) -> Iterator[Callable[[SentenceTransformer], Finding]]:
    """Set the seal aside inside the block, and yield a function that writes a new one.

    Args:
        folder: A saved model, with or without a seal. Its old seal is restored unless the function is called.

    Example:
        >>> with replacing_seal(Path("model")) as seal:  # doctest: +SKIP
        ...     print(seal(SentenceTransformer("model")).detail)
        sealed; since the last seal config_sentence_transformers.json has changed in prompts.query
    """
    files = read_manifest(folder).get("files")
    added = [Difference(name, "was added", True) for name in files_to_seal(folder) if name not in (files or {})]
    changes = "nothing" if files else "it had none"
    if files and (found := [*differences(folder, files), *added]):
        changes = "; ".join(map(str, found))
    old, aside = folder / MANIFEST, folder / f".{MANIFEST}.old"
    had_seal = old.exists()

    def seal(model: SentenceTransformer) -> Finding:
        with reraise_as_write_error(old):
            write_seal(folder, model, files_to_seal(folder))
        return Finding("seal", "ok", f"sealed; since the last seal: {changes}")

    try:
        with reraise_as_write_error(old):
            if had_seal:
                old.rename(aside)
            old.write_text('{"code": {}}', encoding="utf-8")  # as a version without seals: without any, nothing loads
        yield seal
    finally:
        if "files" not in read_manifest(folder):
            if aside.exists():
                aside.replace(old)
            elif not had_seal:
                old.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)


def _unsealed(folder: Path) -> Finding:
    if _read_json_or_empty(folder / "config_sentence_transformers.json").get("sealed"):
        return Finding("seal", "failed", f"{MANIFEST}, which the save wrote last, is missing or unreadable. {_WAY_OUT}")
    return Finding("seal", "warning", "none, so damage cannot be detected. Seal it with `st-llmpool doctor --seal`.")


def _read_json_or_empty(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none that can be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(item)
