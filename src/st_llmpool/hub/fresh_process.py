"""Embed texts with a saved model in a fresh process, as a recipient would."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..modules.errors import InputError

# Of different lengths, so that the batch is padded.
PROBES = ("a cat", "Interest rates rose for the third time this year, said the bank.", "", "list.sort(key=None)")

_EMBED = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
order = json.loads(sys.argv[1])
model = SentenceTransformer(order["model"], trust_remote_code=order["trust_remote_code"], device="cpu")
vectors = []
for prompt in order["prompts"]:
    for side in ("right", "left"):
        model.tokenizer.padding_side = side
        vectors += [model.encode(order["texts"], prompt=prompt or None, batch_size=size) for size in (32, 1)]
np.save(order["result"], np.stack(vectors).reshape(len(order["prompts"]), 4, len(order["texts"]), -1))
"""


def embed_in_fresh_process(
    folder: Path, texts: Sequence[str] = PROBES, *, prompts: Sequence[str] = ("",), trust_remote_code: bool
) -> np.ndarray:
    """Load `folder` with plain sentence-transformers in a new interpreter and embed `texts` in four ways.

    Args:
        folder: A saved model.
        texts: Texts to embed.
        prompts: The texts are embedded with each of them prepended; an empty one is the model's default.
        trust_remote_code: Passed to ``SentenceTransformer``; a native model does not need it.

    Returns:
        Vectors (P, 4, B, D) in float32 for P prompts: padded right, one by one, padded left, one by one.

    Raises:
        InputError: If the fresh process cannot load the model, with its error message.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "vectors.npy"
        order = {
            "model": str(folder),
            "texts": list(texts),
            "prompts": list(prompts),
            "trust_remote_code": trust_remote_code,
            "result": str(result),
        }
        # Relative paths, also of an adapter's base, start at the current folder; -P imports nothing from there.
        command = [sys.executable, "-P", "-c", _EMBED, json.dumps(order)]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode != 0:
            last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
            raise InputError(f"The model in {folder} does not load in a fresh process: {last[0]}")
        return np.load(result).astype(np.float32)
