"""The seal: what a saved model's files were when they were written, so that later damage and edits are found.

``st_llmpool.json`` records size and SHA-256 of every file that a save writes and the content of small JSON files, so
that an edit can be named. Where the package is installed it adds the vectors of three probe texts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import load_file_path
from torch import nn

from .errors import ConfigurationError, DataError, __version__, of_package

logger = logging.getLogger(__name__)

#: The file in a saved model that holds its seal.
MANIFEST = "st_llmpool.json"
#: What modules.json names while a save is under way; the import fails under this name.
UNFINISHED = "sentence_transformers.this_model_was_saved_only_in_part.SaveItAgain"
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "adapter_*")
_LARGEST_HASHED_AT_LOAD, _LARGEST_WITH_CONTENT = 2**24, 2**16  # bytes; to hash 16 MiB takes 16 ms
_ACCEPT = "if it was changed on purpose, `st-llmpool doctor --seal` accepts it"


class Difference(NamedTuple):
    """How a file, by its path below the model's root, differs from its record, and whether the model may be loaded."""

    file: str
    what: str
    loads: bool

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


def begin_save(root: Path, model: nn.Module) -> None:
    """Make `root` unloadable until the save ends, and remove what an earlier one wrote and weights that would win."""
    for part in model.modules():
        adapters = getattr(part, "peft_config", None) or {}
        if any(getattr(adapter, "use_dora", False) for adapter in adapters.values()) and not of_package("adapters"):
            raise ConfigurationError("Only st_llmpool saves a DoRA adapter so that it loads: pip install st-llmpool.")
        base = getattr(getattr(part, "config", None), "_name_or_path", "")
        if adapters and base and Path(base).resolve() == root.resolve():
            raise ConfigurationError(f"{root} holds the base that this adapter needs. Save it into another folder.")
    root.mkdir(parents=True, exist_ok=True)
    earlier = read_manifest(root)
    write_text(root / "modules.json", json.dumps([{"idx": 0, "name": "0", "path": "", "type": UNFINISHED}]))
    names = {MANIFEST, *(file.name for pattern in _WEIGHTS for file in root.glob(pattern))}
    for listed in (earlier.get("files"), earlier.get("code")):
        names |= set(listed) if isinstance(listed, dict) else set()
    for name in names - {"modules.json"}:
        file = root / name
        if _is_inside(name) and file.parent.resolve().is_relative_to(root.resolve()) and not file.is_dir():
            file.unlink(missing_ok=True)
            with suppress(OSError):  # still in use
                file.parent.rmdir()


def times_of_files(root: Path) -> dict[str, int]:
    """Return when the files below `root` were written, but for card, seal and hidden files; by POSIX path."""
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    kept = [name for name in names if not name.startswith(("README.md", "assets/", MANIFEST, ".")) and "/." not in name]
    return {name: (root / name).stat().st_mtime_ns for name in kept}


def write_seal(root: Path, model: SentenceTransformer, names: Collection[str]) -> None:
    """Write the manifest of `model`, saved in `root` as the files `names`."""
    package = of_package("hub.seal_checks")
    probes = package.probe_record(model) if package else {"skipped": "saved without st_llmpool"}
    write_manifest(root, {"files": {name: record_of(root / name) for name in names}, "probes": probes})
    for name in names:  # safetensors 0.8 lets nobody else read weights
        (root / name).chmod((root / MANIFEST).stat().st_mode)


def record_of(file: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file and, of a small JSON file, the content."""
    record: dict[str, Any] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    if file.suffix == ".json" and record["size"] <= _LARGEST_WITH_CONTENT:
        record["content"] = json.loads(file.read_text(encoding="utf-8"))
    return record


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest` with the version that writes it and a hash of itself."""
    write_text(root / MANIFEST, _with_own_hash({**manifest, "version": __version__}))


def read_manifest(root: Path) -> dict[str, Any]:
    """Return the manifest in `root`; empty unless it is as it was written. Those of older versions list code only."""
    try:
        text = (root / MANIFEST).read_text(encoding="utf-8") if (root / MANIFEST).is_file() else ""  # no end in a pipe
        manifest = json.loads(text)
        sealed = manifest.pop("seal", None) is not None or "files" in manifest
        return manifest if not sealed or text == _with_own_hash(manifest) else {}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return {}


def check_seal(model_name_or_path: str, *, verify_weights: bool = False, **where: Any) -> None:
    """Raise DataError if a file of a model in a folder or on the Hub is missing or cut; warn if settings changed.

    `verify_weights` hashes weights too, which otherwise are compared by size, and refuses any difference. A model of
    an older version, which was saved without a seal, passes.
    """
    file = load_file_path(model_name_or_path, MANIFEST, **where)
    root = Path(file or "").parent
    manifest = read_manifest(root) if file else {}
    files = manifest.get("files", {})
    fault = ""
    if file and not manifest:
        fault = "is damaged"
    elif not file and _names_a_seal(load_file_path(model_name_or_path, "config_sentence_transformers.json", **where)):
        fault = "is missing"
    elif verify_weights and not files:
        fault = "holds no seal to verify weights by"
    found = [Difference(MANIFEST, fault, False)] if fault else []
    if file and not Path(model_name_or_path).is_dir():  # the folder of one commit in the cache: fetch what it lacks
        for name in (name for name in files if _is_inside(name) and not (root / name).exists()):
            load_file_path(model_name_or_path, name, **{**where, "revision": root.name})
    found += differences(root, files, quick=not verify_weights)
    if bad := [difference for difference in found if verify_weights or not difference.loads]:
        raise DataError(f"{model_name_or_path} is damaged: {_listed(bad)}. Save or download it again; {_ACCEPT}.")
    if found:
        logger.warning("%s is not as it was saved: %s; %s.", model_name_or_path, _listed(found), _ACCEPT)


def _names_a_seal(config: str | None) -> bool:
    """Return whether a model's config says that it was sealed; sentence-transformers refuses an unreadable one."""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        return bool(config and json.loads(Path(config).read_text(encoding="utf-8")).get("sealed"))
    return False


def differences(root: Path, files: Mapping[str, Any], *, quick: bool = False) -> Iterator[Difference]:
    """Yield how files below `root` differ from their records; `quick` compares of weights and large ones the size."""
    for name, record in files.items():
        file, is_json = root / name, name.endswith(".json")
        if not _is_inside(name) or not file.is_file():
            yield Difference(name, "is missing", False)
            continue
        size, due = file.stat().st_size, record["size"]
        if size < due and not is_json:
            yield Difference(name, f"is cut: {size:,} of {due:,} bytes", False)
        elif quick and size == due and (name.endswith(".safetensors") or size > _LARGEST_HASHED_AT_LOAD):
            continue
        elif size != due or _sha256(file) != record["sha256"]:
            try:
                now = json.loads(file.read_text(encoding="utf-8")) if is_json else None
                fields = list(_changed_fields(record.get("content"), now)) if "content" in record else []
            except (ValueError, RecursionError) as error:
                yield Difference(name, f"cannot be read ({error})", False)
                continue
            what = f"has changed in {_listed(fields)}" if fields else "has other content or layout"
            yield Difference(name, what, bool(fields) or "content" not in record or size >= due)


def _changed_fields(before: Any, now: Any, path: str = "") -> Iterator[str]:
    old, new = (dict(enumerate(value)) if isinstance(value, list) else value for value in (before, now))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys(), key=str):
            yield from _changed_fields(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path.removeprefix(".")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _listed(items: Iterable[object]) -> str:
    words = [str(item) for item in items]
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if words[8:] else "")


def _with_own_hash(manifest: Mapping[str, Any]) -> str:
    content = json.dumps(manifest, indent=1, sort_keys=True)
    return json.dumps({**manifest, "seal": hashlib.sha256(content.encode()).hexdigest()}, indent=1, sort_keys=True)


def write_text(file: Path, text: str) -> None:
    """Write atomically: to a temporary sibling, then rename."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    finally:
        with suppress(OSError):  # renamed, or on a read-only disk
            partial.unlink()
