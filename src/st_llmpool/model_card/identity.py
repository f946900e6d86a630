"""Names a model by its weights, so that mteb never mixes two models' results, and keeps the pictures of its card.

The module code of a saved model calls :func:`identify_card` and :func:`copy_assets` where the package is installed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData
from sentence_transformers.util import load_dir_path

from ..utils.parameters import config_values, hash_weights, tokenizer_state

logger = logging.getLogger(__name__)


def identify_card(card: Any) -> None:
    """Make card data give a name that is unique to the weights; a user's own class stays as it is."""
    if type(card) is SentenceTransformerModelCardData:
        card.__class__ = IdentifiedCardData
    if isinstance(card, IdentifiedCardData):
        card._from_hub = bool(card.base_model_revision) and not Path(str(card.base_model)).exists()


def copy_assets(model: SentenceTransformer, root: Path) -> None:
    """Copy the pictures of a loaded model's card to `root`: sentence-transformers keeps the text of the card only."""
    name, where = getattr(model[0], "loaded_from", None) or ("", {})
    try:
        source = Path((name and load_dir_path(name, subfolder="assets", **where)) or "none")
        if source.is_dir() and source.resolve() != (root / "assets").resolve():
            shutil.copytree(source, root / "assets", dirs_exist_ok=True)
    except Exception as error:  # pictures are worth no failed save, whatever the Hub's HTTP library raises
        logger.warning("The pictures of the card of %s could not be copied: %s", name, error)


class IdentifiedCardData(SentenceTransformerModelCardData):
    """Card data whose ``model_name`` is unique to the weights, since mteb files results under it.

    None for a model as it was loaded from the Hub (mteb then takes id and commit), else ``local/<name>-<fingerprint>``,
    computed when asked for. The card keeps the plain name.
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


def fingerprint(model: SentenceTransformer) -> str:
    """Return a hash of all that the vectors depend on: weights, module settings, tokenizer, prompts."""
    settings: list[Any] = [model.prompts, model.default_prompt_name, model.truncate_dim, model.similarity_fn_name]
    settings += [model.max_seq_length, [[type(module).__name__, module.get_config_dict()] for module in model]]
    settings += [config_values(module.config) for module in model.modules() if hasattr(module, "config")]
    settings.append(tokenizer_state(model.tokenizer))
    settings += [getattr(model.tokenizer, f"{action}_side", None) for action in ("padding", "truncation")]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    hash_weights(model, digest)
    return digest.hexdigest()[:40]
