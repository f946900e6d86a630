"""Do the verdicts keep their promises? Simulated studies without and with a difference, decided as `compare` decides.

    python -m tests.stats.validation [--repeats 5000] [--out tests/stats/validation.md]

writes how often a study of equal designs names a winner (at most 5 % of studies) and how often a planted difference is
found (as often as the plan promises). The tests run the same with fewer repeats.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pandas as pd

from st_llmpool.stats import compare
from st_llmpool.stats.comparison import TypeComparison
from st_llmpool.stats.power_analysis import Pilot, Plan
from st_llmpool.stats.statistics import BETTER, EQUIVALENT, ROPE, decide, difference_test, pooled_seed_error

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

    def draw(self, rng: np.random.Generator, designs: int, studies: int = 1, effect: float = 0.0) -> np.ndarray:
        """Scores of many studies (studies, corpora, tasks, designs, seeds); the last design gains `effect`."""
        shape = (studies, self.corpora, self.tasks, designs, self.seeds)
        scores = rng.normal(0.5, 0.1, size=(*shape[:3], 1, 1)) + np.zeros(shape)
        scores += rng.normal(0, self.corpus_spread, size=(*shape[:2], 1, designs, 1))
        scores += rng.normal(0, self.task_spread, size=(*shape[:4], 1))
        luck = rng.normal(0, self.seed_noise, size=(studies, 1, 1, designs, self.seeds))
        luck[..., -2:-1, :] *= self.noisy
        scores += luck
        scores[..., -1, :] += effect
        return scores

    def scores(
        self, rng: np.random.Generator, designs: Sequence[str], *, effect: float = 0.0, decimals: int = 6
    ) -> pd.DataFrame:
        """A study's results as a table."""
        scores = self.draw(rng, len(designs), effect=effect)
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


def compared(tables: Iterable[pd.DataFrame], contrasts: Sequence[str]) -> Iterator[TypeComparison]:
    """Compares many tables, fifty in one call, as task types that know nothing of each other."""
    tables = iter(tables)
    while batch := list(islice(tables, 50)):
        numbered = [
            table.assign(task_type=f"study {number}", task=f"{number} " + table["task"])
            for number, table in enumerate(batch)
        ]
        yield from compare(pd.concat(numbered, ignore_index=True), contrasts).types


def decisions(
    setting: Setting,
    studies: int,
    designs: Sequence[str],
    contrasts: Sequence[str],
    *,
    effect: float = 0.0,
    decimals: int = 6,
    seed: int = 1,
) -> np.ndarray:
    """The outcomes (studies, contrasts) of many studies at once, by the functions by which `compare` decides on one."""
    scores = setting.draw(np.random.default_rng(seed), len(designs), studies, effect).round(decimals)
    units = scores.mean(axis=2) if setting.corpora > 1 else scores[:, 0]
    pairs = [tuple(map(list(designs).index, contrast.split(":"))) for contrast in contrasts]
    values = np.stack([units[:, :, first] - units[:, :, second] for first, second in pairs], axis=1)
    own = values.mean(axis=2).var(axis=-1, ddof=1) / setting.seeds
    involved = len({place for pair in pairs for place in pair})
    pooled, dof = pooled_seed_error([(setting.seeds, part) for part in own.T], involved)
    tested = difference_test(values, corpora=setting.corpora, seed_error=(pooled[:, None] / setting.seeds, dof))
    return decide(tested)


def null_rates(studies: int, setting: Setting, *, decimals: int = 6) -> tuple[float, float]:
    """How often one of six equal designs is better in one of six contrasts, and above in one of nine other pairs."""
    others = [f"{a}:{b}" for a, b in combinations(DESIGNS, 2) if not {f"{a}:{b}", f"{b}:{a}"} & set(CONTRASTS)]
    named, rest = (
        (abs(decisions(setting, studies, DESIGNS, pairs, decimals=decimals)) == BETTER).any(axis=1).mean()
        for pairs in (CONTRASTS, others)
    )
    return float(named), float(rest)


def planted_rate(studies: int, setting: Setting, *, tests: int) -> float:
    """How often the difference that the plan promises is found, among `tests` contrasts whose others have none."""
    designs = [*(str(number) for number in range(tests)), "planted"]
    contrasts = ["planted:0", *(f"{n}:{n + 1}" for n in range(tests - 1))]
    effect = setting.plan(tests).detectable
    return float((decisions(setting, studies, designs, contrasts, effect=effect, decimals=9)[:, 0] == BETTER).mean())


def equivalence_rate(studies: int, setting: Setting, *, effect: float) -> float:
    """How often two designs are called equivalent that differ by `effect`, in `compare` as it is."""
    rng = np.random.default_rng(4)
    tables = (setting.scores(rng, "ab", effect=effect) for _ in range(studies))
    return float(np.mean([study.pairs[0].outcome == EQUIVALENT for study in compared(tables, ["b:a"])]))


NULL = {
    "12 tasks of one corpus": Setting(),
    "6 corpora of 2 tasks": Setting(corpora=6, tasks=2),
    "12 corpora of 1 task": Setting(corpora=12, tasks=1),
    "12 corpora of 1 task, no corpus effect, no seed noise": Setting(12, 1, corpus_spread=0.0, seed_noise=0.0),
    "12 corpora of 1 task, strong seed noise": Setting(corpora=12, tasks=1, seed_noise=0.01),
    "12 corpora of 1 task, seeds as noisy as corpora": Setting(12, 1, seed_noise=0.0056),
    "12 corpora of 1 task, one design's seeds twice as noisy": Setting(12, 1, seed_noise=0.0056, noisy=2),
    "12 corpora of 1 task, one design's seeds four times as noisy": Setting(12, 1, seed_noise=0.0056, noisy=4),
    "20 corpora of 2 tasks, 5 seeds": Setting(corpora=20, tasks=2, seeds=5),
}


def main() -> None:
    """Writes all rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    repeats = arguments.repeats
    rows = []
    for name, setting in NULL.items():
        named, others = null_rates(repeats, setting)
        promise = "<= 0.05" if setting.noisy < 4 else "none"
        promise = promise if setting.corpora > 1 else "none: a verdict is on this corpus"
        rows.append((f"equal designs, {name}: one is better in 6 named contrasts", named, promise))
        rows.append((f"equal designs, {name}: one is above in 9 exploratory pairs", others, promise))
    named, _ = null_rates(repeats, Setting(corpora=12, tasks=1), decimals=2)
    rows.append(("equal designs, 12 corpora, scores with ties and zeros: one is better", named, "<= 0.05"))
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
    rows.append(
        ("do not differ: called equivalent", equivalence_rate(repeats // 10, setting, effect=0.0), f"{promise:.2f}")
    )
    lines = [
        "# Simulated studies\n",
        f"{repeats} studies a row, a tenth for equivalence: `python -m tests.stats.validation --repeats {repeats}`. "
        "Design × corpus spread 0.005, task spread 0.01, seed noise 0.003, three seeds, or as said.\n",
        "| simulated studies | rate | promise |\n| --- | ---: | ---: |",
        *(f"| {what} | {rate:.4f} | {promise} |" for what, rate, promise in rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)  # noqa: T201
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
