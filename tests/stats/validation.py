"""Do the verdicts keep their promises? Simulated studies without and with a difference, run through `compare` as it is.

    python -m tests.stats.validation [--repeats 2000] [--out tests/stats/validation.md]

writes how often a study of equal designs names a winner (at most 5 % of studies) and how often a planted difference is
found (as often as the plan promises). The tests run the same with fewer repeats.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

from st_llmpool.stats import compare
from st_llmpool.stats.comparison import TypeComparison
from st_llmpool.stats.power_analysis import Pilot, Plan
from st_llmpool.stats.statistics import EQUIVALENT, ROPE

SPREAD = 0.01  # standard deviation of a score between tasks, after the difficulty of the task
DESIGNS = ("1", "2", "3", "4", "5", "mean-bidirectional")
CONTRASTS = ("5:mean-bidirectional", "5:4", "4:2", "5:3", "3:1", "5:1")


@dataclass(frozen=True)
class Setting:
    """How simulated scores vary. Tasks are those of each corpus; `corpus_spread` is that of design × corpus."""

    corpora: int = 1
    tasks: int = 12
    seeds: int = 3
    corpus_spread: float = 0.005
    task_spread: float = SPREAD
    seed_noise: float = 0.003
    noisy: float = 1.0  # the seed noise of the last design but one, over that of the others

    @property
    def pilot(self) -> Pilot:
        """The deviations of the difference of two designs."""
        within = self.task_spread / math.sqrt(self.tasks if self.corpora > 1 else 1)
        between = math.hypot(self.corpus_spread * (self.corpora > 1), within)
        return Pilot(math.sqrt(2) * between, math.sqrt(2) * self.seed_noise, 0.0)

    def plan(self, tests: int) -> Plan:
        """What studies like this promise."""
        return Plan(self.corpora, self.corpora * self.tasks, tests, self.seeds, tests + 1, pilot=self.pilot)

    def scores(
        self, rng: np.random.Generator, designs: Sequence[str], *, effect: float = 0.0, decimals: int = 6
    ) -> pd.DataFrame:
        """A study's results; the last design gains `effect`."""
        shape = (self.corpora, self.tasks, len(designs), self.seeds)
        scores = rng.normal(0.5, 0.1, size=(*shape[:2], 1, 1)) + np.zeros(shape)
        scores += rng.normal(0, self.corpus_spread, size=(self.corpora, 1, len(designs), 1))
        scores += rng.normal(0, self.task_spread, size=(*shape[:3], 1))
        luck = rng.normal(0, self.seed_noise, size=(1, 1, *shape[2:]))
        luck[:, :, -2:-1] *= self.noisy
        scores += luck
        scores[:, :, -1] += effect
        names = [
            [f"corpus {c}" for c in range(self.corpora)],
            [f"{t:02d}" for t in range(self.tasks)],
            list(designs),
            [str(s) for s in range(self.seeds)],
        ]
        index = pd.MultiIndex.from_product(names, names=["corpus", "task", "design", "seed"])
        table = pd.Series(scores.ravel().round(decimals), index, name="score").reset_index()
        return table.assign(task=table["corpus"] + " task " + table["task"], base="base", task_type="STS")


def simulated_scores(
    rng: np.random.Generator,
    designs: Sequence[str],
    *,
    tasks: int,
    seeds: int = 1,
    seed_noise: float = 0.0,
    effect: float = 0.0,
) -> pd.DataFrame:
    """Results on one corpus."""
    setting = Setting(tasks=tasks, seeds=seeds, seed_noise=seed_noise, corpus_spread=0.0)
    return setting.scores(rng, designs, effect=effect).assign(corpus="")


def studies(tables: Iterable[pd.DataFrame], contrasts: Sequence[str]) -> Iterator[TypeComparison]:
    """Compares many tables, fifty in one call, as task types that know nothing of each other."""
    tables = iter(tables)
    while batch := list(islice(tables, 50)):
        numbered = [
            table.assign(task_type=f"study {number}", task=f"{number} " + table["task"])
            for number, table in enumerate(batch)
        ]
        yield from compare(pd.concat(numbered, ignore_index=True), contrasts).types


def null_rates(repeats: int, setting: Setting, *, decimals: int = 6) -> dict[str, float]:
    """How often six equal designs get a winner, or a leader, among six contrasts, and a leader among other pairs."""
    rng = np.random.default_rng(1)
    tables = (setting.scores(rng, DESIGNS, decimals=decimals) for _ in range(repeats))
    with patch("st_llmpool.stats.comparison.signed_rank_posterior", return_value=(0.0, 1.0, 0.0)):
        found = [
            [
                any(pair.winner for pair in study.pairs),
                any(pair.leader for pair in study.pairs if pair.confirmatory),
                any(pair.leader for pair in study.pairs if not pair.confirmatory),
            ]
            for study in studies(tables, CONTRASTS)
        ]
    return dict(zip(("winner", "leader", "exploratory"), np.mean(found, axis=0).tolist(), strict=True))


def planted_rate(repeats: int, setting: Setting, *, tests: int) -> float:
    """How often the difference that the plan promises is found, among `tests` contrasts whose others have none."""
    rng = np.random.default_rng(3)
    designs = [*(f"design {number}" for number in range(tests)), "planted"]
    contrasts = ["planted:design 0", *(f"design {n}:design {n + 1}" for n in range(tests - 1))]
    effect = setting.plan(tests).detectable
    tables = (setting.scores(rng, designs, effect=effect, decimals=9) for _ in range(repeats))
    return float(np.mean([study.pairs[0].leader == "planted" for study in studies(tables, contrasts)]))


def equivalence_rate(repeats: int, setting: Setting, *, effect: float) -> float:
    """How often two designs are called equivalent that differ by `effect`."""
    rng = np.random.default_rng(4)
    tables = (setting.scores(rng, "ab", effect=effect) for _ in range(repeats))
    return float(np.mean([study.pairs[0].outcome == EQUIVALENT for study in studies(tables, ["b:a"])]))


NULL = {
    "12 tasks of one corpus": Setting(),
    "6 corpora of 2 tasks": Setting(corpora=6, tasks=2),
    "12 corpora of 1 task": Setting(corpora=12, tasks=1),
    "12 corpora of 1 task, no corpus effect, no seed noise": Setting(12, 1, corpus_spread=0.0, seed_noise=0.0),
    "12 corpora of 1 task, strong seed noise": Setting(corpora=12, tasks=1, seed_noise=0.01),
    "12 corpora of 1 task, seeds as noisy as corpora": Setting(12, 1, seed_noise=0.0056),
    "12 corpora of 1 task, one design's seeds twice as noisy": Setting(12, 1, seed_noise=0.0056, noisy=2),
    "20 corpora of 2 tasks, 5 seeds": Setting(corpora=20, tasks=2, seeds=5),
}


def main() -> None:
    """Writes all rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    repeats = arguments.repeats
    rows = []
    for name, setting in NULL.items():
        rates = null_rates(repeats, setting)
        rows.append((f"equal designs, {name}: a winner among 6 contrasts", rates["winner"], "<= 0.05"))
        if setting.corpora == 1:
            row = f"equal designs, {name}: one is above on this corpus, among 6 contrasts"
            rows.append((row, rates["leader"], "none, it may be"))
        else:
            rows.append((f"equal designs, {name}: one is above, among 9 exploratory", rates["exploratory"], "<= 0.05"))
    rates = null_rates(repeats, Setting(corpora=12, tasks=1), decimals=2)
    rows.append(("equal designs, 12 corpora, scores with ties and zeros: a winner", rates["winner"], "<= 0.05"))
    for setting, tests in (
        (Setting(corpora=12, tasks=1), 6),
        (Setting(corpora=12, tasks=1, seed_noise=0.0056), 1),
        (Setting(corpora=8, tasks=2), 1),
        (Setting(corpora=20, tasks=1), 6),
        (Setting(corpus_spread=0.0), 6),
    ):
        name = f"{setting.corpora} corpora of {setting.tasks}, {tests} tests"
        promised = setting.plan(tests).detectable
        rows.append((f"planted {promised:.4f}, {name}: found", planted_rate(repeats, setting, tests=tests), "0.80"))
    setting = Setting(corpora=12, tasks=1, task_spread=0.002)
    rows.append((f"differ by {ROPE}: called equivalent", equivalence_rate(repeats, setting, effect=ROPE), "<= 0.05"))
    promise = setting.plan(1).power(0.0, EQUIVALENT)
    rows.append(("do not differ: called equivalent", equivalence_rate(repeats, setting, effect=0.0), f"{promise:.2f}"))
    lines = [
        "# Simulated studies\n",
        f"{repeats} studies a row, by `python -m tests.stats.validation --repeats {repeats} --out FILE`. Design × "
        "corpus spread 0.005, task spread 0.01, seed noise 0.003, three seeds, unless a row says otherwise.\n",
        "| simulated studies | rate | promise |\n| --- | ---: | ---: |",
        *(f"| {what} | {rate:.4f} | {promise} |" for what, rate, promise in rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)  # noqa: T201
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
