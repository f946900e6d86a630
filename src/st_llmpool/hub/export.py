"""Export: a copy of a saved model that is merged, or native to sentence-transformers, proven before it exists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.normalize import Normalize

from ..adapters import merge_adapter
from ..model_card.card import write_card_of
from ..modules.errors import ConfigurationError, InputError
from ..modules.seal import times_of_files, write_seal
from ..utils.files import atomic_folder, refuse_existing
from .folder_code import find_code
from .fresh_process import PROBES, embed_in_fresh_process
from .loading import foreign_code_error, load_model

NATIVE_BACKBONE = "sentence_transformers.base.modules.transformer.Transformer"
_OUR_KEYS = ("attention", "layer_readout", "layers", "add_eos_token", "include_prompt", "causal_layers")
_TOLERANCE = 1e-5
# In half precision a merge rounds the sum of base and adapter once more than the adapter beside its base, and layers
# in 8 bits round their inputs, which whole ones do not.
_TOLERANCE_HALF = 2e-2


def export(
    source: Path, target: Path, *, native: bool = False, merge: bool = False, trust_remote_code: bool = False
) -> Path:
    """Writes a copy of the model in `source` to `target`, after a fresh process gave the same vectors.

    Args:
        source: A saved model.
        target: A folder that does not exist yet.
        native: Only types of sentence-transformers, so that it loads with neither flag nor package. Refused where
            plain sentence-transformers would give other vectors: that is measured, padded on both sides and alone.
        merge: Merge the adapter into the backbone; one that was trained on a base in 4 or 8 bits into what these bits
            stand for, so that the vectors stay those that were trained.
        trust_remote_code: Run code in `source` that is not the installed package's.

    Returns:
        `target`.

    Raises:
        ConfigurationError: If the target exists, the design has no native form, there is no adapter to merge, or there
            is code that is neither the installed package's nor trusted.
        InputError: If the copy gives other vectors.
    """
    refuse_existing(target)
    has_adapter = (source / "adapter_config.json").is_file()
    model = load_model(source, trust_remote_code=trust_remote_code, device="cpu")
    if merge and not has_adapter:
        raise ConfigurationError(f"{source} has no adapter, so there is nothing to merge. Leave --merge out.")
    if native:
        _check_native(model, has_adapter=has_adapter and not merge)
    expected = _vectors(model)
    tolerance = _tolerance(model.transformers_model)
    if merge:
        merge_adapter(model, source)
    with atomic_folder(target) as folder:
        model.save_pretrained(str(folder), create_model_card=False)
        _write_card(model, source, folder, native=native, merged=merge)
        if native:
            _make_native(model, folder)
        if not trust_remote_code and (code := find_code(folder)).to_trust:  # names of code that the source had
            raise foreign_code_error(str(source), code)
        _compare(folder, expected, tolerance=tolerance, native=native)
    return target


def _tolerance(backbone: Any) -> float:
    """Returns how far the vectors of a copy may be from those of the backbone as it is now."""
    quantization = getattr(backbone.config, "quantization_config", None)
    rounds = getattr(quantization, "load_in_8bit", False)  # the inputs of its layers too
    computed_in = {backbone.get_input_embeddings().weight.dtype, getattr(quantization, "bnb_4bit_compute_dtype", None)}
    return _TOLERANCE_HALF if rounds or computed_in & {torch.float16, torch.bfloat16} else _TOLERANCE


def foreign_types(folder: Path) -> list[str]:
    """Returns the classes in modules.json that are not sentence-transformers' own; a native model has none."""
    types = [module["type"] for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
    return [reference for reference in types if not reference.startswith("sentence_transformers.")]


def has_native_form(folder: Path, *, merge: bool) -> bool:
    """Returns whether native is worth a try: our backbone, other modules of sentence-transformers, no lone adapter.

    Args:
        folder: A saved model, of which only the list of modules is read.
        merge: An adapter will be merged.
    """
    return foreign_types(folder) == ["llm_transformer.LLMTransformer"] and (
        merge or not (folder / "adapter_config.json").is_file()
    )


def _check_native(model: SentenceTransformer, *, has_adapter: bool) -> None:
    ours = [type(module).__name__ for module in list(model)[1:] if getattr(module, "is_st_llmpool_module", False)]
    if ours:
        raise ConfigurationError(
            f"{', '.join(ours)} has no native form: only sentence-transformers' own poolings have. Share the model as "
            f"it is (portable): it loads with trust_remote_code=True."
        )
    if has_adapter:
        raise ConfigurationError(
            "An adapter alone cannot be native: its base would load with causal attention. Add --merge."
        )


def _make_native(model: SentenceTransformer, folder: Path) -> None:
    """Rewrites the saved files so that only types of sentence-transformers are named, and removes our code."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
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
    """Sets keys of a JSON file; None removes the key."""
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in values.items() if not (key in changes and value is None)}
    file.write_text(json.dumps(kept, indent=2), encoding="utf-8")


def _vectors(model: SentenceTransformer) -> dict[str, np.ndarray]:
    return {prompt: model.encode(list(PROBES), prompt=prompt or None) for prompt in ("", *_prompts(model))}


def _prompts(model: SentenceTransformer) -> list[str]:
    return sorted({prompt for prompt in model.prompts.values() if prompt})


def _compare(folder: Path, expected: dict[str, np.ndarray], *, tolerance: float, native: bool) -> None:
    for prompt, vectors in expected.items():
        fresh = embed_in_fresh_process(folder, prompt=prompt, trust_remote_code=not native)
        difference = float(np.abs(fresh - vectors).max())
        if not difference <= tolerance:  # also for NaN
            way_out = "Share it as portable instead." if native else "Nothing was written; please report this."
            raise InputError(
                f"In a fresh process the exported model gives other vectors (difference {difference:.1e}, limit "
                f"{tolerance:.0e}{', with a prompt' if prompt else ''}): plain loading does not reproduce it. {way_out}"
            )


def _write_card(model: SentenceTransformer, source: Path, folder: Path, *, native: bool, merged: bool) -> None:
    """Takes the card along with its pictures; where it says how to load another form, it is written anew."""
    if (native or merged) and hasattr(model[0], "layer_readout"):
        write_card_of(model, folder, earlier=source / "README.md", run=source.parent, given={}, native=native)
    elif (source / "README.md").is_file():
        shutil.copy(source / "README.md", folder / "README.md")
        if (source / "assets").is_dir():
            shutil.copytree(source / "assets", folder / "assets", dirs_exist_ok=True)
