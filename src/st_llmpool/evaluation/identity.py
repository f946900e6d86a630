"""Name a model so that results of two models never mix: mteb stores results by name and revision.

By default mteb uses the name from the model card, so all unnamed models, and all fine-tuned copies of one base, get the
scores of whichever came first.
"""

from __future__ import annotations

import re
from pathlib import Path

from sentence_transformers import SentenceTransformer

from ..model_card.identity import fingerprint
from ..utils.files import slug

_IN_EVERY_RUN = re.compile(r"model|training|checkpoints|checkpoint-\d+")


def identify(model: SentenceTransformer, source: str | None = None) -> tuple[str, str]:
    """Return a name and a revision that identify the model, loaded from `source` or in memory.

    A model that was loaded from the Hub by its id keeps id and commit, so that its results line up with the
    leaderboard's. Any other is `local/<folder or card name>` with `fingerprint(model)` as its revision. Folders that
    have the same name in every run, ``model`` and ``checkpoint-60``, are named after their run.
    """
    commit = model.model_card_data.base_model_revision
    if source is not None and commit and not Path(source).exists():
        return source, commit
    title = _of_folder(Path(source).resolve()) if source is not None else model.model_card_data.model_name
    return f"local/{slug((title or 'unnamed').removeprefix('local/'))}", fingerprint(model)


def _of_folder(folder: Path) -> str:
    """Return a folder's name, prefixed by the run's if every run has such a folder."""
    parts = [folder.name]
    if _IN_EVERY_RUN.fullmatch(folder.name):
        run = next((parent.name for parent in folder.parents if not _IN_EVERY_RUN.fullmatch(parent.name)), "")
        parts = [run, *([] if folder.name == "model" else parts)]
    return "-".join(filter(None, parts)) or folder.name
