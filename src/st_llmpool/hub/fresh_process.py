"""Embeds texts with a saved model in a fresh process, as a recipient would, to compare before anything is published."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..modules.errors import InputError

# Short and long together so that the batch is padded, one text alone so that it is not.
PROBES = ("a cat", "Interest rates rose for the third time this year, said the bank.", "", "list.sort(key=None)")

_EMBED = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
order = json.loads(sys.argv[1])
model = SentenceTransformer(order["model"], trust_remote_code=order["trust_remote_code"], device="cpu")
with_prompt = {"prompt": order["prompt"]} if order["prompt"] else {}
vectors = []
for side in ("right", "left"):
    model.tokenizer.padding_side = side
    vectors += [model.encode(order["texts"], **with_prompt), model.encode(order["texts"], batch_size=1, **with_prompt)]
np.save(order["result"], np.stack(vectors))
"""


def embed_in_fresh_process(
    folder: Path, texts: Sequence[str] = PROBES, *, prompt: str = "", trust_remote_code: bool
) -> np.ndarray:
    """Loads `folder` by plain sentence-transformers in a new interpreter and embeds `texts` in four ways.

    Args:
        folder: A saved model.
        texts: Texts to embed.
        prompt: Put before every text.
        trust_remote_code: Passed on; a native model must do without.

    Returns:
        Vectors (4, B, D) in float32: padded right, one by one, padded left, one by one again.

    Raises:
        InputError: If the fresh process cannot load the model, with its own words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "vectors.npy"
        order = {
            "model": str(folder),
            "texts": list(texts),
            "prompt": prompt,
            "trust_remote_code": trust_remote_code,
            "result": str(result),
        }
        # In the current folder, where relative paths start (of an adapter's base too); -P imports nothing from there.
        command = [sys.executable, "-P", "-c", _EMBED, json.dumps(order)]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode != 0:
            last = finished.stderr.strip().splitlines()[-1:] or ["no message"]
            raise InputError(f"The model in {folder} does not load in a fresh process: {last[0]}")
        return np.load(result).astype(np.float32)
