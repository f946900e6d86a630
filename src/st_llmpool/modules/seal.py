"""The seal: what a saved model's files were when they were written, so that later damage and edits are found.

``st_llmpool.json`` records size and SHA-256 of every file that decides the vectors, hashes of the fields of its JSON
files, so that an edit can be named, and the vectors of three probe texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, load_file_path
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_import_files

from .errors import DataError, __version__

logger = logging.getLogger(__name__)

#: The file beside a saved model that holds its seal.
MANIFEST = "st_llmpool.json"

#: What modules.json names while a save is under way; importing it fails under this telling name.
UNFINISHED = "sentence_transformers.this_model_was_saved_only_in_part.SaveItAgain"

#: Texts whose vectors are recorded.
PROBES = (
    "a cat",
    "Interest rates rose for the third time this year, said the bank.",
    "def mean(values): return sum(values) / len(values)",
)

# What loaders read at the root of a model, beside code.
_READ_BY_LOADERS = (
    *("*.safetensors", "*.safetensors.index.json", "config*.json", "*_config.json", "modules.json"),
    *("tokenizer*", "added_tokens.json", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "*.jinja"),
)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "adapter_*")
_LARGEST_HASHED_AT_LOAD = 16 * 2**20  # bytes; weights are larger, and hashing 16 MiB takes about 16 ms
_LARGEST_WITH_FIELDS = 2**20
_PROJECTIONS = 32
_NOT_AS_SAVED = "%s is not as it was saved: %s. If that was on purpose, `st-llmpool doctor --seal` accepts it."


class Difference(NamedTuple):
    """How a file differs from its seal.

    Attributes:
        file: Path below the model's root.
        what: In words: missing, cut, or which fields changed.
        loads: False if the model must not be loaded; True for an edit that a person may have made.
    """

    file: str
    what: str
    loads: bool

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


class SealedSentenceTransformer(SentenceTransformer):
    """A ``SentenceTransformer`` whose saved folder is sealed once everything is in it.

    sentence-transformers writes ``modules.json`` and the card after the modules' own ``save``, so only the model itself
    can seal. :func:`seal_saves` makes one of a model that is ready.
    """

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Saves as the base class does, then writes the seal."""
        super().save(path, *args, **kwargs)
        if path is None:
            return
        write_seal(Path(path), self)
        # A fast tokenizer keeps how it cut and padded its last texts, and a trainer saves it once more.
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_truncation()
            backend.no_padding()


# Cards and messages of sentence-transformers print the name of the model's class; pickle goes by __qualname__.
SealedSentenceTransformer.__name__ = SentenceTransformer.__name__


def seal_saves(model: SentenceTransformer) -> None:
    """Makes every later save of `model` sealed; a subclass that somebody else defined stays as it is."""
    if type(model) is SentenceTransformer:
        model.__class__ = SealedSentenceTransformer


def begin_save(root: Path) -> None:
    """Makes `root` unloadable until sentence-transformers ends its save, and removes the files of an earlier one.

    Without it, a save that is cut off leaves a new backbone beside an old pooling, and an adapter saved over a full
    model leaves both.

    Args:
        root: Root of the saved model. Only files that its manifest lists, and weights that would be loaded in place of
            the new ones, are removed.
    """
    earlier = read_manifest(root)
    placeholder = [{"idx": 0, "name": "0", "path": "", "type": UNFINISHED}]
    write_text(root / "modules.json", json.dumps(placeholder))
    (root / MANIFEST).unlink(missing_ok=True)
    written_already = {"modules.json", "config_sentence_transformers.json"}  # of this save
    weights = [file.name for pattern in _WEIGHTS for file in root.glob(pattern)]
    listed = [name for part in ("files", "code") if isinstance(earlier.get(part), dict) for name in earlier[part]]
    for name in {*listed, *weights} - written_already:
        file = root / name
        if _is_inside(name) and file.parent.resolve().is_relative_to(root.resolve()) and not file.is_dir():
            file.unlink(missing_ok=True)
            with suppress(OSError):  # still in use
                file.parent.rmdir()


def write_seal(root: Path, model: SentenceTransformer) -> None:
    """Writes the manifest of a saved model.

    Args:
        root: Root of the saved model.
        model: What was saved there, for the vectors of the probe texts.
    """
    files = {name: record_of(root / name) for name in files_to_seal(root)}
    write_manifest(root, {"files": files, "probes": _record_probes(model)})


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Writes `manifest` with the version that writes it and a hash of itself."""
    write_text(root / MANIFEST, _with_own_hash({**manifest, "version": __version__}))


def read_manifest(root: Path) -> dict[str, Any]:
    """Returns the manifest in `root`; empty if there is none, or if it is not what :func:`write_manifest` wrote.

    Manifests of versions without seals list code files only and are returned as they are.
    """
    manifest = read_json_or_empty(root / MANIFEST)
    seal = manifest.pop("seal", None)
    if seal is None and "files" not in manifest:
        return manifest
    return manifest if (root / MANIFEST).read_text(encoding="utf-8") == _with_own_hash(manifest) else {}


def files_to_seal(root: Path) -> list[str]:
    """Returns the files of a saved model that decide its vectors, as paths below `root`.

    These are what loaders read at the root, the modules' folders, and the code that is named in `modules.json` or an
    `auto_map`; a file that somebody else put there is not among them.
    """
    modules = json.loads((root / "modules.json").read_text(encoding="utf-8"))
    references = [module["type"] for module in modules]
    for config in map(read_json_or_empty, root.glob("*config.json")):
        references += _strings(config.get("auto_map"))
    code = [file for name in references if (file := root / f"{name.partition('.')[0]}.py").is_file()]
    code += [root / Path(str(needed)).name for file in code for needed in get_relative_import_files(str(file))]
    folders = [root / module["path"] for module in modules if module["path"]]
    read = [file for pattern in _READ_BY_LOADERS for file in root.glob(pattern)]
    files = [*read, *code, *(file for folder in folders for file in folder.rglob("*"))]
    names = {file.relative_to(root).as_posix() for file in files if file.is_file()}
    return sorted(name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts))


def differences(root: Path, files: Mapping[str, Any], *, quick: bool = False) -> Iterator[Difference]:
    """Yields how files differ from their records.

    Args:
        root: Root of the model.
        files: Records by path, as the manifest holds them.
        quick: Compare only the size of weights and of files above 16 MiB.
    """
    for name, record in files.items():
        file = root / name
        if not _is_inside(name) or not file.is_file():
            yield Difference(name, "is missing", False)
            continue
        size, due = file.stat().st_size, record["size"]
        if size < due and file.suffix != ".json":
            yield Difference(name, f"is cut: {size:,} of {due:,} bytes", False)
        elif quick and size == due and (file.suffix == ".safetensors" or size > _LARGEST_HASHED_AT_LOAD):
            continue
        elif size != due or _sha256(file) != record["sha256"]:
            yield (
                _changed(file, name, record) if file.suffix == ".json" else Difference(name, "has other content", True)
            )


def check_seal(model_name_or_path: str, *, verify_weights: bool = False, **where: Any) -> None:
    """Compares a model that is about to be loaded with its seal, weights by their size only.

    Args:
        model_name_or_path: Folder or Hub id; a model without a seal passes.
        verify_weights: Hash the weights too, and refuse any difference.
        **where: ``token``, ``cache_folder``, ``revision`` and ``local_files_only`` of the load.

    Raises:
        DataError: If a file is missing or cut, or `verify_weights` finds another content or no seal.
    """
    file = load_file_path(model_name_or_path, MANIFEST, **where)
    root = None if file is None else Path(file).parent
    files = None if root is None else read_manifest(root).get("files")
    if root is None or files is None:
        _check_unsealed(model_name_or_path, root, verify_weights=verify_weights)
        return
    if not Path(model_name_or_path).is_dir():  # the folder of one commit in the cache: fetch what it lacks
        for name in (name for name in files if _is_inside(name) and not (root / name).exists()):
            load_file_path(model_name_or_path, name, **{**where, "revision": root.name})
    found = list(differences(root, files, quick=not verify_weights))
    if bad := [difference for difference in found if verify_weights or not difference.loads]:
        raise DataError(
            f"{model_name_or_path} is damaged: {_listed(bad)}. Save or download it again; if it was changed on "
            f"purpose, `st-llmpool doctor --seal` accepts it."
        )
    if found:
        logger.warning(_NOT_AS_SAVED, model_name_or_path, _listed(found))


def probe_vectors(model: SentenceTransformer) -> Tensor:
    """Returns 32 fixed projections of the vectors of the probe texts (6, 32), in one batch and then one by one.

    Every dimension enters every projection. Mode of the modules, gradients and random state stay as they are.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            batches = [model.preprocess(list(texts)) for texts in (PROBES, *([text] for text in PROBES))]
            vectors = torch.cat(
                [model(batch_to_device(batch, model.device))["sentence_embedding"] for batch in batches]
            )
    finally:
        for module, mode in modes.items():  # from the root down, as train() sets what is below it too
            if module.training != mode:
                module.train(mode)
    dimensions = torch.arange(1, vectors.shape[1] + 1, dtype=torch.float64)
    angles = torch.outer(dimensions, torch.arange(1, _PROJECTIONS + 1, dtype=torch.float64)) * 2.399963
    return vectors.double().cpu() @ (angles.cos() * (2 / len(dimensions)) ** 0.5)


def _check_unsealed(model: str, root: Path | None, *, verify_weights: bool) -> None:
    """Lets a model of a version without seals pass; not one whose manifest was damaged."""
    content = {} if root is None else read_json_or_empty(root / MANIFEST)
    if root is not None and not content:
        raise DataError(f"{model} is damaged: {MANIFEST} cannot be read. Save or download it again.")
    if verify_weights:
        raise DataError(f"{model} has no intact seal to verify its weights by. See `st-llmpool doctor --seal`.")
    if root is not None and not read_manifest(root):
        logger.warning(_NOT_AS_SAVED, model, f"{MANIFEST} has other content")


def _record_probes(model: SentenceTransformer) -> dict[str, Any]:
    placement: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    if reason := _why_no_forward(model):
        return {**placement, "skipped": reason}
    try:
        rows = probe_vectors(model).tolist()
        return {**placement, "vectors": [" ".join(f"{value:.7g}" for value in row) for row in rows]}
    except Exception as error:  # a save is worth more than its probe vectors
        logger.warning("The vectors of the probe texts could not be computed for the seal: %s", error)
        return {**placement, "skipped": f"{type(error).__name__}: {error}"}


def _why_no_forward(model: SentenceTransformer) -> str | None:
    """Returns why one process alone cannot run the model, None if it can."""
    for parameter in model.parameters():
        if parameter.is_meta:
            return "on the meta device"
        marked = any(hasattr(parameter, mark) for mark in ("ds_id", "_fsdp_flattened"))
        if marked or type(parameter).__name__ == "DTensor":
            return "sharded"
    return None


def record_of(file: Path) -> dict[str, Any]:
    """Returns size and SHA-256 of a file and, if it is a JSON file below 1 MiB, hashes of its fields."""
    record: dict[str, Any] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    if file.suffix == ".json" and record["size"] <= _LARGEST_WITH_FIELDS:
        record["fields"] = dict(_fields(json.loads(file.read_text(encoding="utf-8"))))
    return record


def _fields(value: Any, path: str = "", depth: int = 2) -> Iterator[tuple[str, str]]:
    """Yields the names of a JSON value's fields, two levels deep, with the start of a hash of each."""
    below: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        below = enumerate(value)
    below = list(below)
    if not below or not depth:
        yield path, hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
    for key, item in below if depth else ():
        yield from _fields(item, f"{path}.{key}" if path else str(key), depth - 1)


def _changed(file: Path, name: str, record: Mapping[str, Any]) -> Difference:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return Difference(name, f"cannot be read ({error})", False)
    if "fields" not in record:
        return Difference(name, "has other content", True)
    before, now = record["fields"], dict(_fields(value))
    if fields := sorted(field for field in before.keys() | now.keys() if before.get(field) != now.get(field)):
        return Difference(name, f"has changed in {_listed(fields)}", True)
    return Difference(name, "has another layout", file.stat().st_size >= record["size"])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_json_or_empty(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if there is none that can be read."""
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


def _listed(items: Iterable[object], limit: int = 8) -> str:
    words = [str(item) for item in items]
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def _with_own_hash(manifest: Mapping[str, Any]) -> str:
    content = json.dumps(manifest, indent=1, sort_keys=True)
    seal = hashlib.sha256(content.encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=1, sort_keys=True)


def write_text(file: Path, text: str) -> None:
    """Writes beside and renames, so that a kill never leaves half a file."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
