"""What the tests found: power first, then verdicts, then the tables that they rest on."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from pathlib import Path

from ...stats.comparison import Comparison, Pair, TypeComparison
from ...stats.plots import has_ranks
from ...stats.results import label
from ...stats.tables import INDEPENDENCE, Sheet, about_type, footnotes, p_text, sheets_of_family
from ...utils.files import slug
from ...utils.words import counted, listed
from ..settings import Study
from .document import Document

COMPARISON = "comparison"  # folder that `tables.write` filled

_MARKS = (
    "Marks: > c means better than design c in a pre-registered comparison over tasks, after Holm's correction and by "
    "more than seed noise; > (c) means the same in an exploratory comparison, to be confirmed on other data. No mark "
    "means no significant difference."
)


def write_findings(document: Document, study: Study, comparison: Comparison) -> None:
    """Add the sections on what was found, in the order in which they should be read.

    Args:
        document: The report; the pictures of the comparison are in its folder.
        study: The study.
        comparison: Its results, compared.
    """
    document.section("Power")
    _power(document, comparison)
    document.section("Verdicts")
    _verdicts(document, study, comparison)
    document.section("Scores")
    for base in dict.fromkeys(kind.base for kind in comparison.types):
        document.table(_scores(comparison, base))
    document.text(_MARKS)
    document.section("Exploratory comparisons")
    document.text("These pairs were not pre-registered: what stands out here is a hypothesis for another study.")
    document.bullets((kind.title, _exploratory_verdict(kind)) for kind in comparison.types)
    document.section("All pairs by task type")
    _pairs(document, comparison)
    document.section("Seed noise")
    _seeds(document, comparison)
    document.section("Ablations")
    _ablations(document, study, comparison)


def verdict(kind: TypeComparison) -> str:
    """Return what the pre-registered comparisons say about one task type, in one sentence."""
    pairs = [pair for pair in kind.pairs if pair.confirmatory]
    if not pairs:
        return "no comparison was pre-registered, so there is no verdict."
    if not any(pair.reachable for pair in pairs):
        tasks = max(pair.test.n for pair in pairs)
        return f"undecided; {counted(tasks, 'task')} cannot give a significant result."
    parts = _winners(pairs, "better than")
    unclear = [pair for pair in pairs if pair.significant and pair.winner is None]
    if unclear:
        parts.append(f"no verdict on {_versus(unclear)}: the difference may be seed noise or an effect of few tasks")
    unseen = [pair for pair in pairs if pair.reachable and not pair.significant]
    if unseen:
        which = f"between {_versus(unseen)}" if len(unseen) < len(pairs) else "in any pre-registered comparison"
        found = sorted(f"{pair.detectable:.2g}" for pair in unseen)
        span = found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
        parts.append(f"no significant difference {which} (minimal detectable difference {span} at 80 % power)")
    hopeless = [pair for pair in pairs if not pair.reachable]
    if hopeless:
        parts.append(f"too few tasks for {_versus(hopeless)}")
    return "; ".join(parts) + "."


def _exploratory_verdict(kind: TypeComparison) -> str:
    pairs = [pair for pair in kind.pairs if not pair.confirmatory]
    if not pairs:
        return "there is no other pair."
    if not any(pair.reachable for pair in pairs):
        return f"{counted(len(pairs), 'pair')} over too few tasks for a significant result."
    parts = _winners(pairs, "above")
    return f"of {counted(len(pairs), 'pair')}, " + ("; ".join(parts) or "none is significant") + "."


def _winners(pairs: Sequence[Pair], words: str) -> list[str]:
    won: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.winner is not None:
            won.setdefault(pair.winner, []).append(f"{pair.loser} (by {abs(pair.test.mean_difference):.2g})")
    return [f"{winner} is {words} {listed(losers)}" for winner, losers in won.items()]


def _versus(pairs: Sequence[Pair]) -> str:
    return listed([f"{pair.first} vs {pair.second}" for pair in pairs])


def _power(document: Document, comparison: Comparison) -> None:
    rows, unreachable = [], []
    for kind in comparison.types:
        for family in kind.families:
            name = f"{kind.title}: {'pre-registered' if family.confirmatory else 'exploratory'}"
            plan = family.plan
            found = sorted(pair.detectable for pair in family.pairs if math.isfinite(pair.detectable))
            in_sd = f"{plan.effect:.2f}" if plan.reachable else "none"
            in_score = f"{found[len(found) // 2]:.4f}" if found else "-"
            rows.append((name, str(plan.tasks), str(plan.tests), f"{plan.smallest_p:.3g}", in_sd, in_score))
            unreachable += [] if plan.reachable else [name]
    columns = ("Table", "Tasks", "Tests", "Smallest p Holm", "Detectable, in SD", "Detectable, in score")
    below = (
        "Smallest p Holm: the value if all tasks agree in sign, tests · 2^(1 - tasks). Detectable: the minimal "
        "detectable mean difference at 80 % power, in standard deviations of the differences between tasks, and in "
        "score with the observed spread (median over pairs).",
    )
    document.table(Sheet("Minimal detectable differences", columns, tuple(rows), below))
    if unreachable:
        document.text(
            f"Significance cannot be reached whatever the scores are, so there are no marks: {'; '.join(unreachable)}.",
            warning=True,
        )


def _verdicts(document: Document, study: Study, comparison: Comparison) -> None:
    contrasts = study.contrasts or []
    present = {str(model) for kind in comparison.types for model in kind.scores}
    waiting = [contrast for contrast in contrasts if not set(contrast.split(":")) <= present]
    if contrasts:
        number = counted(len(contrasts), "pre-registered comparison")
        document.text(f"Verdicts rest on {number}: {', '.join(contrasts)}.")
    else:
        document.text("No comparison was pre-registered, so every difference is exploratory.")
    if waiting:
        document.text(
            f"Not tested yet because runs are missing: {', '.join(waiting)}. They will add to the correction.",
            warning=True,
        )
    document.bullets((kind.title, verdict(kind)) for kind in comparison.types)
    document.text(INDEPENDENCE)


def _scores(comparison: Comparison, base: str) -> Sheet:
    """Return the table of a base as in the paper: designs by task types, marked by the corrected tests."""
    kinds = [kind for kind in comparison.types if kind.base == base]
    models = list(dict.fromkeys(str(model) for kind in kinds for model in kind.scores))
    letters = dict(zip(models, string.ascii_letters, strict=False))
    complete = {kind.task_type: kind.scores.dropna() for kind in kinds}

    def cell(kind: TypeComparison, model: str) -> str:
        table = complete[kind.task_type]
        if model not in table or not len(table):
            return "-"
        won = [pair for pair in kind.pairs if pair.winner == model]
        marks = sorted((letters[str(pair.loser)], pair.confirmatory) for pair in won)
        named = [letter for letter, confirmatory in marks if confirmatory]
        others = " ".join(letter for letter, confirmatory in marks if not confirmatory)
        parts = [*named, *([f"({others})"] if others else [])]
        return f"{table[model].mean():.4f}" + (f" > {' '.join(parts)}" if parts else "")

    rows = tuple((f"{letters[model]}: {model}", *(cell(kind, model) for kind in kinds)) for model in models)
    columns = (f"{name}\n{counted(len(table), 'task')}" for name, table in complete.items())
    title = "Mean score over tasks" + (f", {base}" if len({kind.base for kind in comparison.types}) > 1 else "")
    return Sheet(title, ("Design", *columns), rows)


def _pairs(document: Document, comparison: Comparison) -> None:
    for kind in comparison.types:
        document.heading(kind.title)
        for family in kind.families:
            for sheet in sheets_of_family(kind, family):  # the exploratory table is long; the heatmap has its marks
                document.table(sheet, shown=family is kind.families[0])
        path = document.folder / COMPARISON / slug(kind.title)
        marked = [f"{pair.winner} above {pair.loser}" for pair in kind.pairs if pair.winner]
        document.picture(
            Path(f"{path}_pairs.png"),
            alt=f"Heatmap of the mean difference of every pair of designs on {kind.title}. With a verdict: "
            f"{'; '.join(marked) or 'none'}.",
            caption=f"{kind.title}: mean difference, row minus column; * significant, [ ] pre-registered.",
        )
        if kind.ranks is not None and has_ranks(kind):
            order = ", ".join(f"{model} {rank:.2f}" for model, rank in kind.ranks.mean_ranks.items())
            document.picture(
                Path(f"{path}_critical_difference.png"),
                alt=f"Critical-difference diagram of mean ranks on {kind.title}: {order}.",
                caption=f"{kind.title}: mean ranks; the Nemenyi test does not separate designs under one bar.",
            )
        for line in about_type(kind):
            document.text(line)
    for line in footnotes(comparison):
        if line != INDEPENDENCE:
            document.text(line)


def _seeds(document: Document, comparison: Comparison) -> None:
    known = [(kind, kind.seeds) for kind in comparison.types if kind.seeds is not None]
    if not known:
        document.text("No design has two runs, so seed noise is unknown and no p-value covers it.")
        return
    rows = tuple(
        (
            kind.title,
            str(sum(noise.runs.values())),
            f"{noise.sd_seeds:.4f}",
            f"{noise.sd_designs:.4f}",
            p_text(noise.p),
            f"{max(noise.least_difference(a, b) for a in noise.runs for b in noise.runs if a != b):.4f}",
        )
        for kind, noise in known
        if len(noise.runs) > 1
    )
    columns = ("Task type", "Runs", "SD between seeds", "SD between designs", "p", "Least difference")
    below = (
        "Runs are compared by their mean over tasks; seeds are nested in designs. SD between designs excludes seed "
        "noise. p: one-way analysis of variance. Least difference: 95 % of the differences that seeds alone make are "
        "smaller; no verdict is given below it.",
    )
    document.table(Sheet("Seed noise and the variance of designs", columns, rows, below))
    for base in dict.fromkeys(kind.base for kind, _ in known):
        _draw_runs(document, comparison, base)


def _draw_runs(document: Document, comparison: Comparison, base: str) -> None:
    from matplotlib.figure import Figure

    kinds = [kind for kind in comparison.types if kind.base == base and kind.runs]
    models = list(dict.fromkeys(model for kind in kinds for model in kind.runs))
    columns = 2 if len(kinds) > 1 else 1
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(8, lines * (0.9 + 0.24 * len(models))), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, kind in zip(panels, kinds, strict=False):
        for place, model in enumerate(models):
            scores = kind.runs.get(model, [])
            axes.plot(scores, [place] * len(scores), "o", color="tab:blue", markersize=5, alpha=0.6)
            if scores:
                axes.plot([sum(scores) / len(scores)], [place], "|", color="black", markersize=13, markeredgewidth=1.6)
        axes.set_title(kind.title, fontsize=9)
        axes.set_yticks(range(len(models)), models, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    for axes in list(panels):
        axes.set_axis_off()
    figure.axes[0].invert_yaxis()  # the panels have one axis in common
    document.draw(
        figure,
        "runs" + (f"_{base}" if len({kind.base for kind in comparison.types}) > 1 else ""),
        alt="Mean score of every run by design, one panel per task type: the dots of a row are seeds of one design.",
        caption="Each dot is a run, its mean score over tasks; the bar is the mean of the design. Rows whose dots "
        "overlap differ no more than seeds do.",
    )


def _ablations(document: Document, study: Study, comparison: Comparison) -> None:
    options = [design for design in study.designs if design.option and design.design in study.labels]
    rows = []
    for base in dict.fromkeys(kind.base for kind in comparison.types):
        kinds = [kind for kind in comparison.types if kind.base == base]
        for design in options:
            cells = [_change(kind, design.label, label(design.design)) for kind in kinds]
            if any(cell != "-" for cell in cells):
                rows.append((f"{design.label} {base}" if len(study.bases) > 1 else design.label, *cells))
    if rows:
        types = dict.fromkeys(kind.task_type for kind in comparison.types)
        below = (
            "Each option changes one component of its design. Difference from the plain design, with p Holm; * a "
            "verdict as in the tables of pairs, exploratory unless marked (pre-registered).",
        )
        document.table(Sheet("Options against their plain design", ("Option", *types), tuple(rows), below))


def _change(kind: TypeComparison, option: str, plain: str) -> str:
    pair = next((pair for pair in kind.pairs if {pair.first, pair.second} == {option, plain}), None)
    if pair is None:
        return "-"
    difference = pair.test.mean_difference if pair.first == option else -pair.test.mean_difference
    named = " (pre-registered)" if pair.confirmatory else ""
    return f"{difference:+.4f}{'*' if pair.winner else ''}\np {p_text(pair.p_holm)}{named}"
