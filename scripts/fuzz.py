"""Mutate the files that the package reads, and count the exceptions that are not ours, and the hangs.

    python scripts/fuzz.py --count 100000 --seed 0

Everything runs in this process, and no model is built: only readers and builders of settings. Exit code 1 if anything
but a value or an error of ours came out; each kind is printed once, with a file that reproduces it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import yaml

SECONDS = 10  # for one file; the slowest sound one takes a fraction of a second
SECONDS_OF_A_REPORT = 10

RECIPE = {
    "output_dir": "runs/x",
    "seed": 1,
    "preset": "paper",
    "model": {
        "base": "builtin",
        "design": "5",
        "lora": {"r": 8},
        "layers": [1, -1],
        "pooling_kwargs": {"num_heads": 4},
    },
    "data": [{"source": "pairs.jsonl", "columns": {"query": "q", "negative": ["n"]}, "weight": 0.5, "limit": 10}],
    "loss": {"name": "infonce", "mixing": {"hardest": 4}, "matryoshka_dims": [8, 16]},
    "training": {"max_steps": 10, "learning_rate": "1e-4", "warmup_steps": 0.1, "sparse_tuning": {"layers": 2}},
    "evaluation": {"data": [{"source": "held.csv"}], "eval_steps": 5},
    "stages": [
        {"kind": "mntp", "texts": [{"source": "t.txt"}], "masking": {"mlm_probability": 0.2}, "merge": [0.1, 0.5]}
    ],
}
ADAPT = {"output_dir": "x", "base": "b", "texts": [{"source": "t.txt", "limit": 3}], "merge": 0.5, "lora": "paper"}
STUDY = {
    "description": "Why?",
    "bases": {"a": "builtin"},
    "seeds": [0, 1],
    "designs": [{"design": "5"}, {"design": "4", "option": "x", "change": {"model": {"layers": [1]}}}],
    "contrasts": ["5:4 (x)"],
    "recipe": {"model": {"tune": "full"}, "data": [{"source": "{data}/a.parquet"}], "training": {"max_steps": 3}},
    "suite": "builtin",
    "limit": 5,
}
PARTS = {"sentence1": {"part": "1/2"}, "sentence2": {"starts": ["a", "b"]}}
SUITE = {
    "description": "d",
    "tasks": [
        {
            "name": "LocalA",
            "type": "Retrieval",
            "folder": "f",
            "columns": {"id": "_id"},
            "files": {"qrels": "answers.jsonl"},
            "prompt": {"query": "q: "},
            "limit": 5,
            "where": {"corpus": {"title": {"in": ["x", "y"]}}, "queries": {"text": {"length": [0, 0.9]}}},
        },
        {"name": "LocalB", "type": "STS", "folder": "f", "metric": "cosine_pearson", "where": {"test": PARTS}},
    ],
}
RECORD = {
    "id": "a",
    "key": "k",
    "base": "b",
    "design": "5",
    "option": "",
    "seed": 0,
    "recipe": RECIPE,
    "evaluation": {"suite": "s"},
    "training": {"evaluations": [[1, {"x_ndcg@10": 0.5}], [2, {"x_ndcg@10": 0.6}], [3, {"x_ndcg@10": 0.7}]]},
    "evaluation_seconds": 1.5,
    "stages": [{"max_steps": 3}],
    "data": {"a": "b"},
}
POOLING = {"embedding_dimension": 8, "num_layers": 3, "num_latents": 2, "num_heads": 2, "head_dim": 4, "mlp_ratio": 1}
POOLING |= {"queries": "latents", "readout_skip": True, "layer_weights": True}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "llm_transformer.LLMTransformer"},
    {"idx": 1, "name": "1", "path": "1_P", "type": "sentence_transformers.models.Pooling"},
]
MANIFEST = {"version": "0.1", "code": {"a.py": "00"}, "files": {"config.json": {"size": 3, "sha256": "00"}}}
TRAINING = {"rows": {"a": 3}, "losses": [[1, 0.5]], "steps": 3}
SCORES = {"rows": [{"task": "T", "type": "STS", "metric": "m", "score": 0.5}]}
RESULT = {
    "dataset_revision": "r",
    "task_name": "STSBenchmark",
    "mteb_version": "2.0",
    "evaluation_time": 1.0,
    "kg_co2_emissions": None,
    "scores": {"test": [{"hf_subset": "default", "languages": ["eng-Latn"], "main_score": 0.5, "x": 0.1}]},
}
CARD = {
    "license": "mit",
    "tags": ["a"],
    "widget": [{"text": "x"}],
    "language": ["en"],
    "model-index": [
        {
            "name": "m",
            "results": [
                {
                    "task": {"type": "STS", "name": "STS"},
                    "dataset": {"type": "d", "name": "d"},
                    "metrics": [{"type": "pearson", "value": 0.5, "name": "P"}],
                }
            ],
        }
    ],
}
TABLE = "task,task_type,model,score,seed\nA,STS,m,0.5,0\nB,STS,m,0.25,1\nA,STS,n,0.5,0\n"
PAIRS = 'query,positive,negative\nwhat,this,that\n"a, b",c,d\n'
LINES = '{"query": "what", "positive": "this", "negative": ["a"]}\n{"query": "é", "positive": "c", "negative": ["b"]}\n'
WORDS = ["", "no", "yes", "nan", "inf", "-1", "1e38", "null", "paper", "mean", "5", "é", "\ud800", "\0", "a" * 5000]
VALUES: list[object] = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**18, 10**400, 0.5, -0.5, 1e38, 5e-324, [], {}]
VALUES += [float("nan"), float("inf"), -float("inf"), [[]], [None], {"": None}, list(range(1000)), *WORDS]
BYTES = [
    b"\xe9",
    b"\xff\xfe",
    b"\x1f\x8b",
    b"\0",
    b"[" * 3000,
    b"{" * 100,
    b"9" * 5000,
    b"&a [*a]",
    b"!!binary x",
    b"\t",
]
BYTES += [
    b": ",
    b"\n",
    b"- ",
    b'"',
    b",",
    b"\r",
    b"!!int x",
    b".inf",
    b"2020-99-99",
    b"<<: 3",
    b"? [a]",
    b"*x",
    b"\\ud800",
]


@dataclass(frozen=True)
class Target:
    """A kind of file, what reads it, and what writes the sound files that the reader wants next to it."""

    file: str
    content: object
    read: Callable[[Path], object]
    weight: int = 10
    dump: Callable[[object], str] = json.dumps
    prepare: Callable[[Path], object] = lambda folder: None


@dataclass
class Outcome:
    """What came out of the mutated files of one target."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    samples: dict[str, bytes] = field(default_factory=dict)


def targets() -> dict[str, Target]:
    """Return what is fuzzed, by name; imports the package here, so that ``--help`` is quick."""
    from st_llmpool.data.training_data import DatasetSettings, TextSettings, load_pairs, load_texts
    from st_llmpool.designs import POOLINGS
    from st_llmpool.evaluation.suite import read_suite
    from st_llmpool.evaluation.tasks import make_task
    from st_llmpool.hub import doctor
    from st_llmpool.model_card import card
    from st_llmpool.stats.mteb_files import find_models, read_models
    from st_llmpool.stats.readers import read_results, read_task_types
    from st_llmpool.study.records import read_record
    from st_llmpool.study.settings import Study
    from st_llmpool.training import AdaptRecipe, Recipe
    from st_llmpool.training.checks import check_names

    def recipe(file: Path) -> object:
        found = Recipe.from_yaml(file)
        check_names(found)
        return found.to_dict()

    def study(file: Path) -> object:
        return [run.to_recipe(Path("data"), Path("out")) for run in Study.load(file).runs()]

    def suite(file: Path) -> None:
        for task in read_suite(file).tasks:
            make_task(task, file.parent, None).load_data()

    def save_pooling(folder: Path) -> None:
        POOLINGS["multi_layer"].module(**POOLING).save(str(folder))

    def record(file: Path) -> object:
        found = read_record(file.parent)
        return found and (found.rising, found.validation)

    def pooling(file: Path) -> object:
        return POOLINGS["multi_layer"].module.load(str(file.parent))

    def result(file: Path) -> object:
        models = find_models(file.parent)
        return read_models(models, [("m", "")] * len(models))

    def folder(file: Path) -> object:
        return list(doctor.check_files(file.parent))

    def card_text(content: object) -> str:
        return f"---\n{yaml.safe_dump(content)}---\n# Title\n"

    yml: Callable[[object], str] = lambda content: yaml.safe_dump(content, sort_keys=False)  # noqa: E731
    return {
        "recipe": Target("recipe.yaml", RECIPE, recipe, 20, yml),
        "adapt recipe": Target("recipe.yaml", ADAPT, AdaptRecipe.from_yaml, 10, yml),
        "study": Target("study.yaml", STUDY, study, 15, yml),
        "suite": Target("suite.yaml", SUITE, suite, 15, yml, _write_tables),
        "task types": Target("types.yaml", {"A": "STS", "B": "Retrieval"}, read_task_types, 3, yml),
        "pooling config": Target("config.json", POOLING, pooling, 10, prepare=save_pooling),
        "module list": Target("modules.json", MODULES, folder, 5),
        "manifest": Target("st_llmpool.json", MANIFEST, folder, 5),
        "adapter config": Target("adapter_config.json", {"base_model_name_or_path": "./x", "r": 8}, folder, 3),
        "card": Target("README.md", CARD, card.read_front_matter, 8, card_text),
        "training.json": Target("training.json", TRAINING, lambda file: card.training_facts(file.parent), 4),
        "scores.json": Target("scores.json", SCORES, lambda file: card.read_results(file.parent), 3),
        "run record": Target("run.json", RECORD, record, 10),
        "mteb result": Target("STSBenchmark.json", RESULT, result, 5),
        "results CSV": Target("results.csv", TABLE, lambda file: read_results([file]), 4, str),
        "pairs CSV": Target("pairs.csv", PAIRS, lambda file: load_pairs(DatasetSettings(str(file))), 1, str),
        "pairs JSONL": Target("pairs.jsonl", LINES, lambda file: load_pairs(DatasetSettings(str(file))), 1, str),
        "texts": Target("texts.txt", "a text\nanother\n", lambda file: load_texts(TextSettings(str(file))), 1, str),
    }


def _write_tables(folder: Path) -> None:
    """Write the tables that the tasks of `SUITE` read."""
    tables = {
        "corpus": [{"_id": f"d{row}", "title": "xyz"[row % 3], "text": f"text {row}"} for row in range(9)],
        "queries": [{"_id": f"q{row}", "text": f"why {'so ' * row}"} for row in range(9)],
        "answers": [{"query-id": f"q{row}", "corpus-id": f"d{row}"} for row in range(9)],
        "test": [{"sentence1": f"a {row}", "sentence2": f"{'ab'[row % 2]} {row}", "score": row} for row in range(20)],
    }
    (folder / "f").mkdir()
    for name, rows in tables.items():
        (folder / "f" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def mutate(target: Target, rng: random.Random) -> bytes:
    """Return a file of `target` with one to three changes, of its values or of its bytes."""
    content = json.loads(json.dumps(target.content))
    is_text = isinstance(content, str)
    changes = rng.choice((1, 1, 1, 2, 3))
    if not is_text and rng.random() < 0.7:
        for _ in range(changes):
            content = _change_value(content, rng)
        try:
            return target.dump(content).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, ValueError, RecursionError):  # such a value has no YAML
            return b""
    raw = bytearray((content if is_text else target.dump(content)).encode())
    for _ in range(changes):
        place = rng.randrange(len(raw) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            raw[place : place + rng.randrange(1, 20)] = b""
        elif kind == 1:
            raw[place:place] = rng.choice(BYTES)
        elif kind == 2 and place < len(raw):
            raw[place] = rng.randrange(256)
        else:
            raw[place:place] = rng.choice(WORDS).encode("utf-8", "surrogatepass")
    return bytes(raw)


def _change_value(content: object, rng: random.Random) -> object:
    """Replace, remove, rename or wrap a value at a random place."""
    places: list[tuple[object, object]] = []

    def walk(value: object) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            places.append((value, key))
            walk(item)

    walk(content)
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(WORDS) or "x"] = parent.pop(key)
    elif kind == 2:
        parent[key] = rng.choice(([parent[key]], {"x": parent[key]}, [parent[key]] * 3, str(parent[key])))
    else:
        parent[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return content


def fuzz(
    count: int, seed: int, folder: Path, *, only: str | None = None, report: Callable[[str], None] = lambda line: None
) -> dict[str, Outcome]:
    """Read `count` mutated files; fewer if the user interrupts it.

    Args:
        count: How many, over all targets by their weights.
        seed: Of the mutations.
        folder: For the files.
        only: Name of a target; None is all.
        report: Called with a line for each new kind of fault, and for how far it is every ten seconds.
    """
    chosen = {name: target for name, target in targets().items() if only in (None, name)}
    rng = random.Random(seed)
    outcomes = {name: Outcome() for name in chosen}
    disabled, handler = logging.root.manager.disable, signal.signal(signal.SIGALRM, _hang)
    logging.disable(logging.WARNING)
    places = {name: folder / name.replace(" ", "_") for name in chosen}
    for name, place in places.items():
        place.mkdir()
        chosen[name].prepare(place)
    names = rng.choices(list(chosen), [target.weight for target in chosen.values()], k=count)
    began = reported = time.monotonic()
    try:
        for number, name in enumerate(names):
            if time.monotonic() - reported > SECONDS_OF_A_REPORT:
                reported = time.monotonic()
                report(f"{number:,} of {count:,} files, {reported - began:.0f} s")
            content = mutate(chosen[name], rng)
            kind = read_one(chosen[name], places[name] / chosen[name].file, content, outcomes[name])
            if kind is not None:
                report(f"{name}: {kind}")
    except KeyboardInterrupt:
        report(f"interrupted after {sum(outcome.counts.total() for outcome in outcomes.values()):,} files")
    finally:
        logging.disable(disabled)
        signal.signal(signal.SIGALRM, handler)
    return outcomes


def read_one(target: Target, file: Path, content: bytes, outcome: Outcome) -> str | None:
    """Read one file and count what came of it; return its kind of fault if that is new."""
    began = time.monotonic()
    try:
        file.write_bytes(content)
        signal.alarm(SECONDS)
        target.read(file)
        kind = "read"
    except Exception as error:
        kind = "refused" if getattr(error, "is_st_llmpool_error", False) else _kind(error)
    finally:
        signal.alarm(0)
    is_new = kind not in ("read", "refused") and kind not in outcome.counts
    outcome.seconds += time.monotonic() - began
    outcome.counts[kind] += 1
    outcome.samples.setdefault(kind, content)
    return kind if is_new else None


class Hang(Exception):
    """A file took more than `SECONDS`."""


def _hang(signum: int, frame: FrameType | None) -> None:
    raise Hang


def _kind(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "st_llmpool" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:100]}"


def faults(outcomes: dict[str, Outcome]) -> dict[str, int]:
    """Return the outcomes that are neither a value nor an error of ours, with their number."""
    return {
        f"{name}: {outcome}": number
        for name, found in outcomes.items()
        for outcome, number in found.counts.items()
        if outcome not in ("read", "refused")
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of file, such as 'recipe'")
    parser.add_argument("--samples", type=Path, help="folder for a file of each kind of fault")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = partial(print, file=sys.stderr, flush=True)
        outcomes = fuzz(arguments.count, arguments.seed, Path(folder), only=arguments.only, report=report)
    found = faults(outcomes)
    for name, outcome in outcomes.items():
        wrong = sum(number for kind, number in outcome.counts.items() if kind not in ("read", "refused"))
        counts = f"{outcome.counts['read']:8,} read{outcome.counts['refused']:9,} refused{wrong:7,} not ours"
        print(f"{name:16}{counts}, {outcome.seconds:.0f} s")
    for kind, number in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{number:6,}  {kind}")
    if arguments.samples:
        arguments.samples.mkdir(parents=True, exist_ok=True)
        for number, kind in enumerate(found):
            name, _, outcome = kind.partition(": ")
            (arguments.samples / f"{number}-{name}").write_bytes(outcomes[name].samples[outcome])
    count = sum(outcome.counts.total() for outcome in outcomes.values())
    print(f"{sum(found.values()):,} of {count:,} not ours, {time.monotonic() - began:.0f} s")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
