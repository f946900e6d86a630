"""Do the tests keep their promises? Simulated studies without and with a difference, run through `compare` as it is.

    python -m tests.stats.validation [--repeats 400]

prints how often equal designs are called different (at most 5 %) and how often a planted effect is found (as often as
the plan promises). The tests run the same with fewer repeats.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from unittest.mock import patch

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from st_llmpool.stats import compare
from st_llmpool.stats.comparison import TypeComparison
from st_llmpool.stats.power_analysis import Plan, detectable_item_effect
from st_llmpool.stats.statistics import item_test, paired_test

SPREAD = 0.01  # standard deviation of a score between tasks, after the difficulty of the task
DESIGNS = ("1", "2", "3", "4", "5", "mean-bidirectional")
CONTRASTS = ("5:mean-bidirectional", "5:4", "4:2", "5:3", "3:1", "5:1")

# What takes most of the time and changes no verdict: intervals, and that statsmodels collects garbage every time.
_NO_INTERVAL = patch("st_llmpool.stats.statistics.bootstrap_interval", return_value=(math.nan, math.nan))


def simulated_scores(
    rng: np.random.Generator,
    designs: Sequence[str],
    *,
    tasks: int,
    seeds: int = 1,
    seed_noise: float = 0.0,
    effect: float = 0.0,
    decimals: int = 6,
) -> pd.DataFrame:
    """A study's results: task difficulty, what a task does to a design, and what a seed does; the last one gains."""
    difficulty = rng.normal(0.5, 0.1, size=tasks)
    scores = difficulty[:, None, None] + rng.normal(0, SPREAD, size=(tasks, len(designs), 1))
    scores = scores + rng.normal(0, seed_noise, size=(1, len(designs), seeds)) + np.zeros((tasks, 1, 1))
    scores[:, -1] += effect
    rows = [
        (
            "base",
            design,
            "",
            str(seed),
            f"Task{task:02d}",
            "STS",
            "test",
            "default",
            "main_score",
            scores[task, d, seed],
        )
        for task in range(tasks)
        for d, design in enumerate(designs)
        for seed in range(seeds)
    ]
    columns = ["base", "design", "option", "seed", "task", "task_type", "split", "subset", "metric", "score"]
    return pd.DataFrame(rows, columns=columns).round({"score": decimals})


def studies(tables: Iterable[pd.DataFrame], contrasts: Sequence[str]) -> Iterator[TypeComparison]:
    """Compares many tables, fifty in one call, as task types that know nothing of each other."""
    tables = iter(tables)
    while batch := list(islice(tables, 50)):
        numbered = [table.assign(task_type=f"study {number}") for number, table in enumerate(batch)]
        with _NO_INTERVAL, patch("gc.collect"):
            found = compare(pd.concat(numbered, ignore_index=True), contrasts)
        yield from found.types


def rate_of_the_test(repeats: int, *, tasks: int, planted: bool) -> float:
    """How often the test over tasks alone is significant, on normal differences: without tables, repeats are cheap."""
    effect = Plan(tasks, 1).effect if planted else 0.0
    differences = np.random.default_rng(5).normal(effect, 1, size=(repeats, tasks))
    with _NO_INTERVAL:
        return float(np.mean([paired_test(row).p <= 0.05 for row in differences]))


def null_rate(repeats: int, *, tasks: int, decimals: int = 6) -> float:
    """How often the same design under two names is called significantly different."""
    rng = np.random.default_rng(0)
    tables = (simulated_scores(rng, "ab", tasks=tasks, decimals=decimals) for _ in range(repeats))
    return float(np.mean([study.pairs[0].significant for study in studies(tables, ["a:b"])]))


def null_family_rates(repeats: int, *, tasks: int) -> tuple[float, float]:
    """How often any of six contrasts, and any of the nine exploratory pairs, of six equal designs is significant."""
    rng = np.random.default_rng(1)
    tables = (simulated_scores(rng, DESIGNS, tasks=tasks) for _ in range(repeats))
    marks = [
        [any(pair.significant for pair in study.pairs if pair.confirmatory is named) for named in (True, False)]
        for study in studies(tables, CONTRASTS)
    ]
    confirmatory, exploratory = np.mean(marks, axis=0)
    return float(confirmatory), float(exploratory)


def null_verdict_rates_with_seed_noise(repeats: int, *, tasks: int, seeds: int = 3) -> tuple[float, float]:
    """Equal designs that got different luck: how often significant over tasks, and how often also called better."""
    rng = np.random.default_rng(2)
    tables = (simulated_scores(rng, "ab", tasks=tasks, seeds=seeds, seed_noise=SPREAD) for _ in range(repeats))
    pairs = [study.pairs[0] for study in studies(tables, ["a:b"])]
    significant, verdict = np.mean([[pair.significant, "is better than" in pair.verdict] for pair in pairs], axis=0)
    return float(significant), float(verdict)


def planted_rate(repeats: int, *, tasks: int, tests: int) -> float:
    """How often the effect that the plan names is found, among `tests` contrasts whose others have none."""
    rng = np.random.default_rng(3)
    designs = [*(f"design {number}" for number in range(tests)), "planted"]
    effect = Plan(tasks, tests).effect * SPREAD * np.sqrt(2)  # of a difference of two designs
    contrasts = ["planted:design 0", *(f"design {n}:design {n + 1}" for n in range(tests - 1))]
    tables = (simulated_scores(rng, designs, tasks=tasks, effect=effect, decimals=9) for _ in range(repeats))
    return float(np.mean([study.pairs[0].significant for study in studies(tables, contrasts)]))


def planted_verdict_rate(repeats: int, *, tasks: int, seeds: int = 3) -> float:
    """How often the difference that a pair without one promises to find gets a verdict, seeds and tasks varying."""
    rng = np.random.default_rng(6)
    options = {"tasks": tasks, "seeds": seeds, "seed_noise": SPREAD / 2, "decimals": 9}
    pilots = (simulated_scores(rng, "abcdef", **options) for _ in range(20))
    promised = np.median([pair.detectable for study in studies(pilots, ["f:a"]) for pair in study.pairs[:1]])
    tables = (simulated_scores(rng, "abcdef", effect=float(promised), **options) for _ in range(repeats))
    return float(np.mean([study.pairs[0].winner == "f" for study in studies(tables, ["f:a"])]))


def item_rates(repeats: int, *, tasks: int, items: int, sd_tasks: float, planted: bool) -> tuple[float, float]:
    """How often the test over items is significant: for tasks like these, and for these tasks only."""
    rng = np.random.default_rng(4)
    effect = detectable_item_effect(tasks, items, sd_tasks=sd_tasks, sd_items=0.3) if planted else 0.0
    significant = []
    for _ in range(repeats):
        means = rng.normal(effect, sd_tasks, size=tasks)
        test = item_test({f"task {t}": rng.normal(mean, 0.3, size=items) for t, mean in enumerate(means)})
        significant.append([test.p <= 0.05, test.p_here <= 0.05])
    like, only = np.mean(significant, axis=0)
    return float(like), float(only)


def main() -> None:
    """Prints all rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    repeats = parser.parse_args().repeats
    table = Table("Simulated studies", "Rate", "Promise", title=f"{repeats} repeats ({50 * repeats} of the test alone)")
    for tasks in (6, 12, 20):
        rate = rate_of_the_test(50 * repeats, tasks=tasks, planted=False)
        table.add_row(f"test alone, no difference, {tasks} tasks", f"{rate:.4f}", "<= 0.05")
        rate = rate_of_the_test(50 * repeats, tasks=tasks, planted=True)
        table.add_row(f"test alone, planted effect, {tasks} tasks", f"{rate:.4f}", ">= 0.80")
    for tasks in (6, 12, 20):
        table.add_row(f"equal designs, {tasks} tasks", f"{null_rate(repeats, tasks=tasks):.4f}", "<= 0.05")
    rate = null_rate(repeats, tasks=12, decimals=2)
    table.add_row("equal designs, 12 tasks, scores with ties and zeros", f"{rate:.4f}", "<= 0.05")
    confirmatory, exploratory = null_family_rates(repeats, tasks=12)
    table.add_row("six equal designs, 12 tasks: any of 6 contrasts", f"{confirmatory:.4f}", "<= 0.05")
    table.add_row("six equal designs, 12 tasks: any of 9 exploratory", f"{exploratory:.4f}", "<= 0.05")
    significant, verdict = null_verdict_rates_with_seed_noise(repeats, tasks=12)
    table.add_row("equal designs, strong seed noise: significant over tasks", f"{significant:.4f}", "none")
    table.add_row("equal designs, strong seed noise: called better", f"{verdict:.4f}", "near 0.05")
    for tasks, tests in ((8, 1), (12, 1), (12, 6), (20, 6)):
        rate = planted_rate(repeats, tasks=tasks, tests=tests)
        table.add_row(f"planted effect, {tasks} tasks, {tests} tests", f"{rate:.4f}", ">= 0.80")
    rate = planted_verdict_rate(repeats, tasks=12)
    table.add_row("planted effect as a pair promises it, three seeds: called better", f"{rate:.4f}", ">= 0.80")
    for tasks, sd_tasks in ((3, 0.0), (3, 0.3), (12, 0.0), (12, 0.3)):
        like, only = item_rates(repeats, tasks=tasks, items=50, sd_tasks=sd_tasks, planted=False)
        what = f"items, equal designs, {tasks} tasks of 50, tasks {'differ' if sd_tasks else 'alike'}"
        table.add_row(f"{what}: tasks like these", f"{like:.4f}", "0.05")
        if not sd_tasks:
            table.add_row(f"{what}: these tasks only", f"{only:.4f}", "0.05")
    like, _ = item_rates(repeats, tasks=12, items=50, sd_tasks=0.1, planted=True)
    table.add_row("items, planted effect, 12 tasks of 50", f"{like:.4f}", "0.80")
    Console().print(table)


if __name__ == "__main__":
    main()
