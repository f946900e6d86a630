"""Queries per second of a causal design behind one instruction, against plain sentence-transformers.

An instruction of 40 tokens, queries of 12, `encode` with a prompt's name: ours computes the instruction once for each
batch. Run it as

    python benchmarks/shared_start.py [--device cuda] [--batch-size 32]

The ceiling is the ratio of the tokens that are computed.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import Row, alternate, arguments, compare, finish, our_model, plain_model, random_backbone, words

from st_llmpool import optimize_inference

INSTRUCTION, QUERY, REQUIRED = 40, 12, 2.0


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints the table."""
    args = arguments(__doc__, argv, ("--batch-size", {"type": int, "help": "32 on a CPU, 256 on a GPU"}))
    args.batch_size = args.batch_size or {"cpu": 32, "cuda": 256}[args.device]
    shape = "tiny" if args.quick else {"cpu": "small", "cuda": "qwen3-0.6b"}[args.device]
    rng = random.Random(0)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        ours = our_model(random_backbone(shape, Path(scratch), args.device), "1", args.device)
    assert optimize_inference(ours).uses("shared start")
    known = words(ours.tokenizer)
    eos = 1
    prompt = "".join(rng.choices(known, k=INSTRUCTION))
    queries = ["".join(rng.choices(known, k=QUERY - eos)) for _ in range(2 * args.batch_size)]
    plain = plain_model("", "causal", "lasttoken", args.device, like=ours)
    runs = [
        lambda model=model: model.encode(queries, prompt=prompt, batch_size=args.batch_size) for model in (ours, plain)
    ]
    difference = abs(runs[0]() - runs[1]()).max()
    every, once = args.batch_size * (INSTRUCTION + QUERY), INSTRUCTION + args.batch_size * QUERY
    note = f"ceiling {every / once:.2f}, max difference {difference:.0e}"
    what = f"instruction reuse {shape}, batch {args.batch_size}"
    rows = [compare(what, *alternate(*runs, args), limit=REQUIRED, at_least=True, note=note)]
    row = rows[0]
    title = f"{len(queries) / row.ours:.0f} queries/s, plain {len(queries) / row.plain:.0f} queries/s"
    return finish(title, rows, args)


if __name__ == "__main__":
    main()
