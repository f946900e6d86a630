"""Export a saved model, merged or in native sentence-transformers form, after comparing its vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.normalize import Normalize

from ..adapters import merge_adapter
from ..model_card.card import write_card_of
from ..modules.errors import ConfigurationError, InputError
from ..modules.seal import times_of_files, write_seal
from ..utils.files import atomic_folder, check_new_folder
from ..utils.reading import read_json, read_json_object
from .folder_code import find_code
from .fresh_process import PROBES, embed_in_fresh_process
from .loading import foreign_code_error, load_model

NATIVE_BACKBONE = "sentence_transformers.base.modules.transformer.Transformer"
_OUR_KEYS = ("attention", "layer_readout", "layers", "add_eos_token", "include_prompt", "causal_layers")
_TOLERANCE = 1e-5
# In half precision a merge rounds the sum of base and adapter, and 8-bit layers round their inputs; the other form does
# not.
_TOLERANCE_HALF = 2e-2


def export(
    model: str | Path,
    output_dir: str | Path,
    *,
    native: bool = False,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write a copy of a saved model, and keep it only if a fresh process computes the same vectors from it.

    Args:
        model: Folder of the saved model.
        output_dir: A folder that does not exist yet.
        native: Use only classes of sentence-transformers, so that the copy loads without flag or package. Refused if
            plain sentence-transformers computes other vectors, alone or padded on either side.
        merge: Merge the adapter into the backbone. For a base in 4 or 8 bits, the adapter is merged into the
            dequantised weights, which keeps the trained vectors.
        trust_remote_code: Run code in the model's folder that is not the installed package's.

    Returns:
        `output_dir`.

    Raises:
        ConfigurationError: If `output_dir` exists, the design has no native form, there is no adapter to merge, or the
            model needs untrusted code.
        InputError: If the copy gives other vectors.

    Example:
        >>> export("runs/mine/model", "merged", merge=True)  # doctest: +SKIP
        PosixPath('merged')
    """
    source, target = Path(model), Path(output_dir)
    check_new_folder(target)
    has_adapter = (source / "adapter_config.json").is_file()
    embedder = load_model(source, trust_remote_code=trust_remote_code, device="cpu")
    if merge and not has_adapter:
        raise ConfigurationError(f"{source} has no adapter, so there is nothing to merge. Leave --merge out.")
    if native:
        _check_native(embedder, has_adapter=has_adapter and not merge)
    if not merge:
        refuse_local_base(source)
    expected = _vectors(embedder)
    tolerance = _tolerance(embedder.transformers_model)
    if merge:
        merge_adapter(embedder, source)
    with atomic_folder(target) as folder:
        embedder.save_pretrained(str(folder), create_model_card=False)
        _write_card(embedder, source, folder, native=native, merged=merge)
        if native:
            _make_native(embedder, folder)
        if not trust_remote_code and (code := find_code(folder)).to_trust:  # references to code in the source's configs
            raise foreign_code_error(str(source), code)
        _compare(folder, expected, tolerance=tolerance, native=native)
    return target


def _tolerance(backbone: Any) -> float:
    """Return the largest allowed difference between the vectors of the copy and of the original."""
    quantization = getattr(backbone.config, "quantization_config", None)
    rounds = getattr(quantization, "load_in_8bit", False)  # these layers round their inputs too
    computed_in = {backbone.get_input_embeddings().weight.dtype, getattr(quantization, "bnb_4bit_compute_dtype", None)}
    return _TOLERANCE_HALF if rounds or computed_in & {torch.float16, torch.bfloat16} else _TOLERANCE


def foreign_types(folder: Path) -> list[str]:
    """Return the classes in modules.json that are not sentence-transformers' own; a native model has none."""
    types = [module["type"] for module in read_json(folder / "modules.json")]
    return [reference for reference in types if not reference.startswith("sentence_transformers.")]


def refuse_local_base(folder: Path) -> None:
    """Refuse to share an adapter whose base is a local folder: others do not have it, and its path may be private."""
    base = adapter_base(folder)
    if base is not None and (Path(base).exists() or not is_repo_id(base)):
        raise ConfigurationError(
            f"The base of the adapter in {folder} is a local path, {base!r}, so nobody else could load it. Share it "
            f"merged (--merge), or train from the base's Hub id."
        )


def adapter_base(folder: Path) -> str | None:
    """Return the base of a saved adapter; None for a complete model."""
    file = folder / "adapter_config.json"
    return read_json_object(file).get("base_model_name_or_path") if file.is_file() else None


def is_repo_id(name: str) -> bool:
    """Return whether `name` may be a repository's on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def has_native_form(folder: Path, *, merge: bool) -> bool:
    """Return whether the design may have a native form: only the backbone is ours, and no adapter stays unmerged.

    Args:
        folder: A saved model; only its list of modules is read.
        merge: The adapter will be merged.
    """
    return foreign_types(folder) == ["llm_transformer.LLMTransformer"] and (
        merge or not (folder / "adapter_config.json").is_file()
    )


def _check_native(model: SentenceTransformer, *, has_adapter: bool) -> None:
    ours = [type(module).__name__ for module in list(model)[1:] if getattr(module, "is_st_llmpool_module", False)]
    if ours:
        raise ConfigurationError(
            f"{', '.join(ours)} has no native form; only sentence-transformers' own poolings have one. Share the model "
            f"as it is (portable): it loads with trust_remote_code=True."
        )
    if has_adapter:
        raise ConfigurationError(
            "An adapter alone cannot be native: its base would load with causal attention. Add --merge."
        )


def _make_native(model: SentenceTransformer, folder: Path) -> None:
    """Rewrite the saved files to refer only to classes of sentence-transformers, and remove our code."""
    modules = read_json(folder / "modules.json")
    for entry, module in zip(modules, model, strict=True):
        if getattr(module, "is_st_llmpool_module", False):
            entry["type"] = NATIVE_BACKBONE
        elif (folder / entry["path"] / "config.json").is_file() and hasattr(module, "include_prompt"):
            _edit_json(folder / entry["path"] / "config.json", include_prompt=model[0].include_prompt)
        elif type(module) is Normalize and module.get_config_dict() == Normalize().get_config_dict():
            # It says the defaults alone, and one changed letter in it would switch normalisation off.
            (folder / entry["path"] / "config.json").unlink()
    (folder / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")
    _edit_json(folder / "sentence_bert_config.json", **dict.fromkeys(_OUR_KEYS))
    for file in folder.glob("*.py"):
        file.unlink()
    write_seal(folder, model, times_of_files(folder))


def _edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes the key."""
    values = read_json_object(file) | changes
    kept = {key: value for key, value in values.items() if not (key in changes and value is None)}
    file.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def _vectors(model: SentenceTransformer) -> dict[str, np.ndarray]:
    return {prompt: model.encode(list(PROBES), prompt=prompt or None) for prompt in {"", *model.prompts.values()}}


def _compare(folder: Path, expected: dict[str, np.ndarray], *, tolerance: float, native: bool) -> None:
    found = embed_in_fresh_process(folder, prompts=list(expected), trust_remote_code=not native)
    for (prompt, vectors), fresh in zip(expected.items(), found, strict=True):
        difference = float(np.abs(fresh - vectors).max())
        if not difference <= tolerance:  # also for NaN
            way_out = "Share the portable form instead." if native else "Nothing was written; please report this."
            raise InputError(
                f"In a fresh process the exported model gives other vectors (difference {difference:.1e}, limit "
                f"{tolerance:.0e}{', with a prompt' if prompt else ''}). {way_out}"
            )


def _write_card(model: SentenceTransformer, source: Path, folder: Path, *, native: bool, merged: bool) -> None:
    """Copy the card and its figures, or regenerate the card if the exported form is loaded in another way."""
    if (native or merged) and hasattr(model[0], "layer_readout"):
        write_card_of(model, folder, earlier=source / "README.md", run=source.parent, given={}, native=native)
    elif (source / "README.md").is_file():
        shutil.copy(source / "README.md", folder / "README.md")
        if (source / "assets").is_dir():
            shutil.copytree(source / "assets", folder / "assets", dirs_exist_ok=True)
