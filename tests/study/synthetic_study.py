"""A study that nobody trained: records and scores as runs would leave them, with differences that are known.

`python -m tests.study.synthetic_study FOLDER` writes its report, to be looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from st_llmpool.analysis.layers import LayerAnalysis, LayerProfile
from st_llmpool.stats.results import Results, complete
from st_llmpool.study.records import RunRecord
from st_llmpool.study.settings import DesignSettings, PlannedRun, Study, factors

TASKS = 12
# What a design has above the others, by task type. Nothing on Classification; on Clustering the order is reversed.
PLANTED = {
    "STS": {"5": 0.04, "5 (last 4 layers)": 0.04, "4": 0.015},
    "Retrieval": {"5": 0.05, "5 (last 4 layers)": 0.01, "3": 0.03, "4": 0.03},
    "Classification": {},
    "Clustering": {"1": 0.05},
}
_LAYERS = 6


def synthetic_study(**changes: object) -> Study:
    """Six designs and one option, three seeds."""
    designs = [DesignSettings(name) for name in ("mean-bidirectional", "1", "2", "3", "4", "5")]
    designs.append(DesignSettings("5", "last 4 layers", {"model": {"layers": [-4, -3, -2, -1]}}))
    recipe = {
        "model": {"tune": "full", "max_seq_length": 128},
        "data": [{"source": "{data}/pairs/train.parquet", "license": "cc-by-sa-4.0"}],
        "loss": {"name": "infonce"},
        "training": {"max_steps": 200, "batch_size": 64, "learning_rate": 5e-4},
    }
    settings = {
        "designs": designs,
        "recipe": recipe,
        "name": "synthetic",
        "description": "Does pooling over all layers pay? Made-up scores with known differences; nothing was trained.",
        "seeds": [0, 1, 2],
        "contrasts": ["5:mean-bidirectional", "5:4", "4:2", "5:3", "3:1", "5:1"],
        "untrained": False,
        "bm25": False,
    }
    return Study(**(settings | changes))


def synthetic_records(study: Study, runs: Sequence[PlannedRun] | None = None) -> list[RunRecord]:
    """Records of the runs (all of them by default); design 3 is under-trained, the pooling of 2 did nothing."""
    return [_record(run) for run in (study.runs() if runs is None else runs)]


def synthetic_results(
    records: Sequence[RunRecord],
    *,
    tasks: int = TASKS,
    items: bool = True,
    types: Sequence[str] = tuple(PLANTED),
    corpora: bool = True,
) -> Results:
    """Scores with what is planted, the spread of tasks and the noise of seeds; items for retrieval, step 0 for all."""
    rows = []
    for record in records:
        for place, task_type in enumerate(types):
            planted = PLANTED[task_type]
            design = f"{record.design} ({record.option})" if record.option else record.design
            rng = np.random.default_rng([place, record.seed, *map(ord, design)])
            of_design = np.random.default_rng([place, *map(ord, design)])
            difficulty = np.random.default_rng(place).normal(0.5, 0.1, size=tasks)
            scores = difficulty + of_design.normal(0, 0.01, size=tasks) + planted.get(design, 0.0)
            scores = scores + rng.normal(0, 0.003)
            for task, score in enumerate(scores):
                name = f"{task_type}Slice{task:02d}"
                of_run = [record.base, record.design, record.option, str(record.seed)]
                of_run += [*factors(record.recipe["model"]).values(), record.diverged]
                start = [*of_run, f"corpus {task}" if corpora else "", name, task_type, "test", "default"]
                rows.append([*start, "", "main_score", "", round(float(score), 6)])
                rows.append([*start, "0", "main_score", "", round(float(score) - 0.1, 6)])
                if task_type == "Retrieval" and items:
                    noise = np.random.default_rng([task, *map(ord, design)]).normal(0, 0.2, size=20)
                    rows += [[*start, "", "ndcg", str(item), float(score + n)] for item, n in enumerate(noise)]
    names = ["base", "design", "option", "seed", "attention", "readout", "pooling", "diverged", "corpus", "task"]
    names += ["task_type", "split", "subset", "step", "metric", "item", "score"]
    table = complete(pd.DataFrame(rows, columns=names))
    first = table[(table["task_type"] == "Retrieval") & (table["step"] == "0")].drop_duplicates("task")
    factorless = dict.fromkeys(["base", "option", "attention", "readout", "pooling", "step"], "")
    return Results(pd.concat([table, first.assign(design="bm25", score=0.5, **factorless)], ignore_index=True))


def _record(run: PlannedRun) -> RunRecord:
    rng = np.random.default_rng([run.seed, *map(ord, run.label)])
    steps = np.arange(10, 201, 10)
    trained = run.design not in ("1", "mean-bidirectional")
    end = 0.005 if run.design == "2" else 0.3
    speed = 400 if run.design == "3" else 40
    curve = 0.6 + len(run.label) / 400 + rng.normal(0, 0.003) + 0.2 * (1 - np.exp(-steps[4::5] / speed))
    if run.design != "3":
        curve[-1] = curve[-2]
    training = {
        "wall_seconds": 110.0 + 10 * trained,
        "device": "cpu",
        "precision": "fp32",
        "rows": {"pairs": 20_000},
        "parameters": 8_400_000 + 300_000 * trained,
        "trained_parameters": 8_400_000 + 300_000 * trained,
        "pooling_did_nothing": end < 0.01 if trained else None,
        "versions": {"st_llmpool": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "steps": 200,
        "losses": [[int(s), float(4 * np.exp(-s / 60) + 0.4 + rng.normal(0, 0.05))] for s in steps],
        "pooling_share": [[int(s), float(end * (1 - np.exp(-s / 50)))] for s in steps] if trained else [],
        "evaluations": [
            [int(s), {"held_out_cosine_ndcg@10": float(v)}]
            for s, v in zip([0, *steps[4::5]], [0.5, *curve], strict=True)
        ],
    }
    return RunRecord(
        id=run.id,
        key=run.key,
        base=run.base,
        design=run.design,
        option=run.option,
        seed=run.seed,
        recipe=run.recipe,
        evaluation=run.evaluation,
        training=training,
        evaluation_seconds=40.0,
        data={"pairs/train.parquet": "0123456789abcdef"},
        machine={"gpu": None, "processor": "x86_64", "threads": 1},
        cost=_cost(run, trained) if run.seed == 0 else None,
        layers=_layers(run) if run.seed == 0 and "5" in run.label else None,
    )


def _cost(run: PlannedRun, trained: bool) -> dict:
    """As `Cost.to_dict` gives it, measured on a CPU."""
    grows = 1.3 if run.design in ("2", "4") else 1.05 if trained else 1.0
    none = {"flops": None, "latency_ms": None, "peak_memory_mb": None}
    lengths = [none | {"tokens": n, "flops": grows * 1.3e7 * n, "latency_ms": grows * 0.05 * n} for n in (32, 512)]
    lengths.append(none | {"tokens": 4096, "reason": "the model reads 2048 tokens at most"})
    parameters = {"backbone": 8_400_000, "adapter": 0, "pooling": 300_000 * trained}
    return {**parameters, "lengths": lengths, "device": "cpu", "dtype": "float32", "threads": 1, "dimension": 256}


def _layers(run: PlannedRun) -> dict:
    numbers = list(range(1, _LAYERS + 1))
    apart = abs(np.subtract.outer(numbers, numbers))
    values = np.linspace(0.1, 1.0, _LAYERS)

    def look(reach: float) -> LayerProfile:
        alone = {"similarity": (0.4 + 0.3 * values).tolist(), "search": (0.5 + 0.2 * values**2).tolist()}
        similar = {"cka": np.exp(-apart / reach).tolist(), "correlation": np.exp(-apart / (reach + 1)).tolist()}
        return LayerProfile(**similar, **alone, norms=values.tolist())

    report = LayerAnalysis(
        texts=40,
        readout="mean",
        after=look(2.0),
        before=look(4.0),
        change=values.tolist(),
        read=numbers,
        attention=(values / values.sum()).tolist(),
        weight_norms=values[::-1].tolist(),
        moved=(0.02 * values).tolist(),
    )
    return report.to_dict()


if __name__ == "__main__":
    from st_llmpool.study.report import write_report

    study = synthetic_study()
    records = synthetic_records(study)
    print(write_report(study, records, synthetic_results(records), Path(sys.argv[1])))  # noqa: T201
