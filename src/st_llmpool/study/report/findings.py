"""What the tests found: the headline, the forest plot, verdicts with their power, and the tables they rest on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from ...stats.comparison import Comparison, Pair, TypeComparison
from ...stats.results import label
from ...stats.statistics import Array
from ...stats.tables import Sheet, footnotes, mean_text, number, p_text, sheets_of_family
from ...utils.files import slug
from ...utils.words import counted, listed
from ..settings import Study, designs_of
from .document import Document

COMPARISON = "comparison"  # folder that `tables.write` filled
_MOST_PAIRS = 10  # in the forest plot, where none was pre-registered
_COLOURS = {"better": "tab:blue", "worse": "tab:blue", "equivalent": "tab:green"}


def headline(comparison: Comparison) -> str:
    """Return the finding in one sentence: the verdict that holds on most task types.

    A winner comes before an equivalence, and both before what holds in one run or on one corpus only.
    """
    found: dict[tuple[int, str], list[str]] = {}
    text: tuple[int, str]
    for kind in comparison.types:
        for pair in kind.pairs:
            if pair.confirmatory and not pair.identical and (pair.leader or "equivalent" in pair.short):
                first, second = (pair.second, pair.first) if pair.leader == pair.second else (pair.first, pair.second)
                if pair.winner:
                    text = (0, f"{first} is better than {second} on {{}}")
                elif pair.leader:
                    text = (2, f"{first} scores above {second} on {{}},{pair.scope}")
                else:
                    text = (1, f"{first} and {second} are equivalent on {{}}" + f",{pair.scope}" * bool(pair.scope))
                found.setdefault(text, []).append(kind.title)
    if not found:
        pairs = [pair for kind in comparison.types for pair in kind.pairs if pair.confirmatory]
        return f"None of {counted(len(pairs), 'named comparison')} is decided" if pairs else "No comparison was named"
    (_, words), types = min(found.items(), key=lambda entry: (entry[0][0], -len(entry[1])))
    return words.format(" and ".join([", ".join(types[:-1]), types[-1]] if len(types) > 1 else types))


def answer(comparison: Comparison) -> str:
    """Return how many of the named comparisons were decided, and how."""
    pairs = [pair for kind in comparison.types for pair in kind.pairs if pair.confirmatory]
    counts = Counter(pair.short for pair in pairs)
    how = ", ".join(f"{count} {words}" for words, count in counts.most_common())
    several = f" in {counted(len(comparison.types), 'task type')}"
    return f"Of {counted(len(pairs), 'named comparison')}{several}: {how}." if pairs else "No comparison was named."


def write_results(
    document: Document,
    study: Study,
    comparison: Comparison,
    untrained: Comparison | None,
    lexical: pd.DataFrame,
    *,
    marks: bool = True,
) -> None:
    """Add the forest plot, the scores and the verdicts.

    Args:
        document: The report.
        study: The study.
        comparison: Its results, compared.
        untrained: The same of step 0, if there are such scores.
        lexical: Scores of BM25.
        marks: Also show what rests on tests; a withdrawn study has scores only.
    """
    document.section("Results")
    if marks:
        for base, kinds in _by_base(comparison).items():
            _draw_forest(document, comparison, kinds, "forest" + (f"_{base}" if base else ""))
    for base, kinds in _by_base(comparison).items():
        before = {kind.title: kind for kind in (untrained.types if untrained else ())}
        document.table(Sheet.of("Mean score" + (f", {base}" if base else ""), *_score_rows(kinds, before, lexical)))
    if marks:
        document.section("Verdicts")
        _write_verdicts(document, study, comparison)


def write_tests(document: Document, study: Study, comparison: Comparison) -> None:
    """Add every pair, and options against their plain design."""
    document.section("All pairs")
    _write_pairs(document, comparison)
    options = [
        (option.label, label(option.design))
        for option in study.designs
        if option.option and option.design in study.labels
    ]
    below = "Each option changes one component of its design; first minus second."
    document.table(Sheet.of("Options against their plain design", outcomes(comparison, options), below))


def outcomes(
    comparison: Comparison, contrasts: Iterable[tuple[str, str]], types: Sequence[str] = ()
) -> Iterator[dict[str, str]]:
    """Yield a row per contrast (and base): the verdict on its first design, a column per task type.

    Args:
        comparison: The comparison.
        contrasts: Labels of the first and second design.
        types: The task types; all by default.
    """
    for first, second in contrasts:
        names = [comparison.names.get(design, design) for design in (first, second)]
        for base, kinds in _by_base(comparison).items():
            chosen = [kind for kind in kinds if kind.task_type in types or not types]
            cells = {kind.task_type: _outcome(kind, *names) for kind in chosen}
            if any(cells.values()):
                where = f", {base}" if base else ""
                yield {"Contrast": f"{names[0]}\n- {names[1]}{where}", **{kind: cells[kind] or "-" for kind in cells}}


def _outcome(kind: TypeComparison, first: str, second: str) -> str:
    """Return verdict, difference and corrected p-value of a contrast; empty if it was not tested."""
    pair = next((pair for pair in kind.pairs if {pair.first, pair.second} == {first, second}), None)
    if pair is None:
        return ""
    words, difference = pair.short, pair.mean
    if pair.first != first:
        turned = {"better": "worse", "worse": "better", "above": "below", "below": "above"}
        words = " ".join(turned.get(word, word) for word in words.split(" "))
        difference = -difference
    named = "" if pair.confirmatory else " (exploratory)"
    return f"{words}{named}\n{difference:+.4f}, p {p_text(pair.p_holm)}"


def _by_base(comparison: Comparison) -> dict[str, list[TypeComparison]]:
    """Return the task types of each base, under an empty name if there is only one."""
    bases = list(dict.fromkeys(kind.base for kind in comparison.types))
    return {base if len(bases) > 1 else "": [kind for kind in comparison.types if kind.base == base] for base in bases}


def _score_rows(
    kinds: Sequence[TypeComparison], before: dict[str, TypeComparison], lexical: pd.DataFrame
) -> tuple[list[dict[str, str]], str]:
    """Return a row per design, its untrained row below, BM25, and how to read them."""
    headings = {f"{kind.task_type}\n{kind.size}": (kind.means, before.get(kind.title)) for kind in kinds}
    starts = {heading: kind.means for heading, (_, kind) in headings.items() if kind is not None}
    rows = []
    for model in dict.fromkeys(str(model) for means, _ in headings.values() for model in means.index):
        rows.append({"Design": model, **{name: mean_text(means, model) for name, (means, _) in headings.items()}})
        if any(model in means.index for means in starts.values()):
            rows.append({"Design": "- untrained", **{name: mean_text(starts[name], model) for name in starts}})
    bm25 = {"Design": "BM25"}
    for heading, kind in zip(headings, kinds, strict=True):
        own = lexical[lexical["task"].isin(kind.scores.dropna().index.get_level_values("task"))]
        bm25 |= {heading: number(own.groupby("corpus")["score"].mean().mean())} if len(own) else {}
    rows += [bm25] if len(bm25) > 1 else []
    below = "Mean over corpora of the mean over their tasks ± standard deviation between seeds."
    if starts:
        kept = {
            name: pd.concat([headings[name][0]["mean"], start["mean"]], axis=1).dropna()
            for name, start in starts.items()
        }
        alike = [
            f"{name.split(chr(10))[0]} {number(agreement(*both.to_numpy().T), '.2f')}" for name, both in kept.items()
        ]
        below += f" Rank correlation of the designs before and after training: {', '.join(alike)}."
    return rows, below


def agreement(first: Array, second: Array) -> float:
    """Return Spearman's correlation; NaN where either is constant or there are fewer than three values."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(spearmanr(first, second).statistic)


def _draw_forest(document: Document, comparison: Comparison, kinds: Sequence[TypeComparison], name: str) -> None:
    from matplotlib.figure import Figure

    named = list(dict.fromkeys((p.first, p.second) for kind in kinds for p in kind.pairs if p.confirmatory))
    named = named or list(dict.fromkeys((p.first, p.second) for kind in kinds for p in kind.pairs))[:_MOST_PAIRS]
    columns = min(2, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(9, lines * (0.8 + 0.5 * len(named))), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True).flat)
    told = []
    for axes, kind in zip(panels, kinds, strict=False):
        axes.axvspan(-comparison.rope, comparison.rope, color="tab:green", alpha=0.12, linewidth=0)
        axes.axvline(0, color="0.4", linewidth=0.8)
        pairs = {(pair.first, pair.second): pair for pair in kind.pairs}
        for place, contrast in enumerate(named):
            if contrast in pairs:
                _draw_contrast(axes, place, pairs[contrast])
                told.append(f"{kind.title}, {' minus '.join(contrast)}: {pairs[contrast].mean:+.4f}")
        axes.set_title(f"{kind.title}: {kind.size}", fontsize=9)
        axes.set_yticks(range(len(named)), [f"{first}\n- {second}" for first, second in named], fontsize=7.5)
        axes.tick_params(axis="x", labelsize=8, labelbottom=True)
        axes.set_ylim(len(named) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.25)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    units = "corpora" if any(pair.plan.corpora > 1 for kind in kinds for pair in kind.pairs) else "tasks of one corpus"
    document.draw(
        figure,
        name,
        alt=f"Forest plot of the mean difference of each contrast. {'; '.join(told)}.",
        caption=f"Difference of each contrast, first minus second: line, its 95 % interval; dots, {units}; the "
        f"band is the region of practical equivalence, ±{comparison.rope:g}. Blue: decided; green: equivalent; white: "
        "undecided.",
    )


def _draw_contrast(axes: object, place: int, pair: Pair) -> None:
    units = pair.units
    spread = [place + 0.22 + 0.12 * (number % 2) for number in range(len(units))]
    axes.plot(units, spread, "o", color="0.55", markersize=2.5, alpha=0.7)  # type: ignore[attr-defined]
    colour = "tab:blue" if pair.leader else _COLOURS.get(pair.short.split(" ")[0], "white")
    low, high = pair.interval
    if not math.isnan(low):
        axes.plot([low, high], [place, place], color="black", linewidth=1.3)  # type: ignore[attr-defined]
    axes.plot([pair.mean], [place], "D", color=colour, markeredgecolor="black", markersize=6)  # type: ignore[attr-defined]


def _write_verdicts(document: Document, study: Study, comparison: Comparison) -> None:
    contrasts = study.contrasts or []
    waiting = [contrast for contrast in contrasts if not designs_of(contrast) <= comparison.names.keys()]
    if contrasts:
        document.text(f"Verdicts rest on {counted(len(contrasts), 'pre-registered comparison')}.")
    else:
        document.text("No comparison was pre-registered, so every difference is exploratory and there is no verdict.")
    if waiting:
        document.text(
            f"Not tested yet because runs are missing: {', '.join(waiting)}. They will add to the correction.",
            warning=True,
        )
    pairs = [(first, second) for first, _, second in (contrast.partition(":") for contrast in contrasts)]
    below = (
        f"First minus second, with p Holm; the verdict is on the first design. Equivalent: within "
        f"±{comparison.rope:g}. Undecided is neither a difference nor an equivalence."
    )
    families = [(kind.title, family) for kind in comparison.types for family in kind.families]
    power = [f"Power, {title}: {family.plan}" for title, family in families if family.confirmatory]
    document.table(Sheet.of("Pre-registered comparisons", outcomes(comparison, pairs), below, *power))
    unreachable = [title for title, family in families if not family.plan.reachable and family.confirmatory]
    if unreachable:
        document.text(f"Too few corpora or tasks for any verdict: {', '.join(unreachable)}.", warning=True)


def _write_pairs(document: Document, comparison: Comparison) -> None:
    document.text(
        "Pairs that were not pre-registered are exploratory: what stands out is a hypothesis for another study."
    )
    for kind in comparison.types:
        document.heading(f"{kind.title}: {kind.size}")
        for family in kind.families:
            for sheet in sheets_of_family(kind, family):  # the exploratory table is long; the heat map has its marks
                document.table(sheet, shown=family.confirmatory)
        path = document.folder / COMPARISON / slug(kind.title)
        marked = listed(
            (f"{pair.leader} in {pair.first} - {pair.second}" for pair in kind.pairs if pair.leader), most=6
        )
        document.picture(
            Path(f"{path}_pairs.png"),
            alt=f"Heat map of the mean difference of every pair of designs on {kind.title}. Above: {marked or 'none'}.",
            caption=f"{kind.title}: mean difference, row minus column; * significant, [ ] pre-registered.",
        )
        if kind.ranks is not None and Path(f"{path}_ranks.png").is_file():
            order = ", ".join(f"{model} {rank:.2f}" for model, rank in kind.ranks.mean_ranks.items())
            document.picture(
                Path(f"{path}_ranks.png"),
                alt=f"Diagram of mean ranks on {kind.title}: {order}.",
                caption=f"{kind.title}: mean ranks; bars join designs that the pair tests, corrected by Holm, do not "
                f"separate. Friedman F {kind.ranks.f:.2f}, p {p_text(kind.ranks.p)}.",
            )
    for line in footnotes(comparison):
        document.text(line)


def mean_scores(comparison: Comparison, base: str) -> dict[str, float]:
    """Return the mean over task types of the mean score, of designs that have all types."""
    kinds = [kind for kind in comparison.types if not base or kind.base == base]
    means = pd.DataFrame({kind.title: kind.means["mean"] for kind in kinds}).dropna()
    return {str(model): float(value) for model, value in means.mean(axis=1).items()}
