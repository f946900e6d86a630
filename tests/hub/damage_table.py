"""Damages saved models file by file and counts what loading and the doctor notice.

    python -m tests.hub.damage_table [DESIGN ...] [--flips N] [--edits N]

Every deletion of one file, three truncations and N bit flips of each, and N one-letter edits of each JSON file; the
card and its pictures decide no vector and are left out. Prints a line for each design and form.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import LlamaConfig, dynamic_module_utils
from transformers.utils.logging import disable_progress_bar

from st_llmpool import DESIGNS, build_embedder
from st_llmpool.hub.doctor import doctor
from st_llmpool.hub.export import export
from st_llmpool.hub.seal_checks import seal_findings
from st_llmpool.modules.errors import StLlmpoolError
from tests.conftest import save_tiny_llm

FORMS = {
    **{number: DESIGNS[number] for number in "12345"},
    "scalar_mix": {"attention": "bidirectional", "pooling": "scalar_mix"},
    "hopfield": {"attention": "bidirectional", "pooling": "hopfield"},
}
SMALL = LlamaConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
TEXTS = ["the quick fox", "a lazy dog sleeps near tall trees", ""]
_LETTER = re.compile(rb"[A-Za-z0-9]")


@dataclass
class Tally:
    """What happened to the damaged copies of one model.

    Attributes:
        cases: How many there were, by kind of damage.
        unnoticed: Those that load with other vectors and no warning.
        loads: Deletions and truncations that load.
        passes: Those that the doctor passes.
    """

    cases: Counter[str] = field(default_factory=Counter)
    unnoticed: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)


def save_form(folder: Path, design: str, *, adapter: bool = False) -> Path:
    """Saves a small model of a design with random poolings, and returns its folder."""
    base = save_tiny_llm(folder / "base", SMALL)
    options = {"peft_config": {"r": 4}} if adapter else {}
    spec = FORMS[design]
    settings = spec if isinstance(spec, dict) else {"attention": spec.attention, "pooling": spec.pooling}
    model = build_embedder(base, **settings, prompts={"query": "Find: "}, verify=False, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("1.") or "lora_B" in name:
                parameter += torch.randn_like(parameter) * 0.3
    model.save_pretrained(str(folder / "model"))
    return folder / "model"


def damages(folder: Path, flips: int, edits: int, rng: random.Random) -> Iterator[tuple[str, str, bytes | None]]:
    """Yields kind, file and damaged content, None for a deletion."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or name.startswith(("README", "assets/", ".")):
            continue
        content = file.read_bytes()
        yield "deletion", name, None
        for size in {0, len(content) // 2, len(content) - 1}:
            yield "truncation", name, content[:size]
        for _ in range(flips):
            place = rng.randrange(len(content))
            yield "bit flip", name, _replaced(content, place, content[place] ^ (1 << rng.randrange(8)))
        if name.endswith(".json"):
            places = [match.start() for match in _LETTER.finditer(content)]
            for place in rng.sample(places, min(edits, len(places))):
                letters = [code for code in b"0123456789" if 48 <= content[place] <= 57] or list(b"abcxyzABCXYZ")
                yield "edit", name, _replaced(content, place, rng.choice([x for x in letters if x != content[place]]))


def sweep(folder: Path, *, native: bool, flips: int, edits: int, seed: int = 0) -> Tally:
    """Damages `folder` in every way, one at a time, and notes what loading and the doctor say."""
    tally, warnings = Tally(), _Warnings()
    expected = _vectors(SentenceTransformer(str(folder), trust_remote_code=not native))
    assert doctor(folder).ok, doctor(folder).findings
    for kind, name, content in list(damages(folder, flips, edits, random.Random(seed))):
        file, before = folder / name, (folder / name).read_bytes()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        tally.cases[kind] += 1
        label = f"{kind} of {name}"
        warnings.seen.clear()
        try:
            vectors = _vectors(SentenceTransformer(str(folder), trust_remote_code=not native))
        except Exception:  # refused, by whatever
            vectors = None
        if vectors is not None:
            same = vectors.shape == expected.shape and bool(np.array_equal(vectors, expected))
            if not same and not warnings.seen and not (kind == "bit flip" and name.endswith(".safetensors")):
                tally.unnoticed.append(label)
            if kind in ("deletion", "truncation"):
                tally.loads.append(label)
        if _doctor_passes(folder):
            tally.passes.append(label)
        file.write_bytes(before)
    return tally


def _doctor_passes(folder: Path) -> bool:
    """Returns what the doctor says; its first checks, which it runs before any other, spare most loads."""
    try:
        if any(finding.status == "failed" for finding in seal_findings(folder)):
            return False
    except StLlmpoolError:
        return False
    return doctor(folder).ok


class _Warnings(logging.Handler):
    """Collects warnings of the model's own code and of the libraries."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []
        logging.getLogger().addHandler(self)
        for library in ("transformers", "sentence_transformers"):
            logging.getLogger(library).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


def _vectors(model: SentenceTransformer) -> np.ndarray:
    return np.concatenate([model.encode(TEXTS), model.encode(TEXTS, prompt_name="query")])


def _replaced(content: bytes, place: int, value: int) -> bytes:
    return content[:place] + bytes([value]) + content[place + 1 :]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("designs", nargs="*", default=list(FORMS))
    parser.add_argument("--flips", type=int, default=2)
    parser.add_argument("--edits", type=int, default=4)
    options = parser.parse_args()
    disable_progress_bar()
    # It parses every code file at every load, to see that all that it imports is installed: a third of the time.
    dynamic_module_utils.check_imports = dynamic_module_utils.get_relative_imports
    for design in options.designs or FORMS:
        for form in ("full", "adapter", "native"):
            root = Path(tempfile.mkdtemp())
            try:
                folder = save_form(root, design, adapter=form == "adapter")
                if form == "native":
                    folder = export(folder, root / "native", native=True, trust_remote_code=True)
            except ValueError as error:  # designs of ours have no native form
                _say(f"{design:<12} {form:<8} {str(error)[:60]}")
                continue
            tally = sweep(folder, native=form == "native", flips=options.flips, edits=options.edits)
            counts = ", ".join(f"{count} {kind}s" for kind, count in sorted(tally.cases.items()))
            _say(
                f"{design:<12} {form:<8} {counts}: {len(tally.unnoticed)} load unnoticed with other vectors, "
                f"{len(tally.loads)} deletions or truncations load, {len(tally.passes)} pass the doctor"
            )
            for part in ("unnoticed", "loads", "passes"):
                for label, count in Counter(getattr(tally, part)).items():
                    _say(f"    {part}: {label} ({count})")
            shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
