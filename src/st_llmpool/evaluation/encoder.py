"""A model as mteb calls it: named by its weights, with its prompts, refusing embeddings that are not finite.

mteb files results by name and revision, and by default takes the name from the card: all unnamed models, and all
fine-tuned copies of one base, would get the scores of whichever came first. It scores NaN silently: a comparison with
NaN is false, so a broken text merely ranks last.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import SentenceTransformer

from ..model_card.identity import fingerprint
from ..modules.errors import InputError
from ..utils.extras import importing_mteb
from ..utils.files import slug
from .tasks import LocalTask

with importing_mteb():
    from mteb.abstasks import AbsTask
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.models.abs_encoder import get_prompt
    from mteb.types import PromptType

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import Array, BatchedInput
    from torch.utils.data import DataLoader


class FiniteEncoder(SentenceTransformerEncoderWrapper):
    """A model as mteb calls it.

    mteb finds prompts in the model's `prompts` (by task, by type, by role); without any, that of the local suite is
    used.

    Args:
        model: The model.
        tasks: The tasks to run.
        identity: Name and revision of the results; None if no results are written.
    """

    def __init__(
        self, model: SentenceTransformer, tasks: Iterable[AbsTask], identity: tuple[str, str] | None = None
    ) -> None:
        with warnings.catch_warnings():  # mteb calls sentence-transformers by names of before version 6
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(model)
        if identity is not None:
            name, revision = identity
            self.mteb_model_meta = self.mteb_model_meta.model_copy(update={"name": name, "revision": revision})
        own = self.model_prompts or {}
        self.model_prompts = {**_suite_prompts(tasks, own), **own}

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Array:
        """Return the embeddings of N texts, (N, D)."""
        embeddings = super().encode(inputs, task_metadata=task_metadata, prompt_type=prompt_type, **kwargs)
        finite = np.isfinite(np.asarray(embeddings)).all(axis=-1)
        if not finite.all():
            first = int(np.flatnonzero(~finite)[0])
            row: Any = inputs.dataset[first]
            role = f"{prompt_type.value} " if prompt_type else ""
            raise InputError(
                f"Task {task_metadata.name}: {np.count_nonzero(~finite)} of {len(finite)} {role}embeddings are not "
                f"finite; the first is of text {first} ({row['text'][:80]!r}). Check the weights, or change dtype."
            )
        return embeddings


def _suite_prompts(tasks: Iterable[AbsTask], own: Mapping[str, str]) -> dict[str, str]:
    """Return the prompts of local tasks for which the model has none, under the names that mteb looks up."""
    prompts = {}
    for task in tasks:
        if not isinstance(task, LocalTask) or not task.metadata.prompt:
            continue
        given = task.metadata.prompt
        by_role = given if isinstance(given, dict) else {role.value: given for role in PromptType}
        for role in PromptType:
            if role.value in by_role and not get_prompt(dict(own), task.metadata, role):
                prompts[f"{task.metadata.name}-{role.value}"] = by_role[role.value]
        if isinstance(given, str) and not get_prompt(dict(own), task.metadata, None):
            prompts[task.metadata.name] = given
    return prompts


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
