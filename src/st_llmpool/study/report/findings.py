"""What the tests found: power, verdicts, and the tables that they rest on."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

from ...stats.comparison import Comparison, TypeComparison
from ...stats.results import label
from ...stats.tables import INDEPENDENCE, Sheet, about_type, footnotes, p_text, sheets_of_family
from ...utils.files import slug
from ...utils.words import counted
from ..settings import Study
from .document import Document

COMPARISON = "comparison"  # folder that `tables.write` filled

_MARKS = (
    "Marks: > c means better than design c in a pre-registered comparison over tasks, after Holm's correction and by "
    "more than seed noise; > (c) means the same in an exploratory comparison, to be confirmed on other data. No mark "
    "means no significant difference."
)
#: Claims of Tang and Yang 2024 (arXiv 2409.02727): text, the two designs, and the task types.
CLAIMS = (
    ("Bidirectional attention with a trained pooling is better than causal attention with the last token on "
     "similarity and search.", ("5", "1"), ("STS", "Retrieval")),
    ("It is not better on classification and clustering.", ("5", "1"), ("Classification", "Clustering")),
    ("Pooling over all layers is better than over the last one, with bidirectional attention.", ("5", "4"),
     ("STS", "Retrieval")),
    ("Pooling over all layers is better than over the last one, with causal attention.", ("3", "2"),
     ("STS", "Retrieval")),
)  # fmt: skip


def write_findings(document: Document, study: Study, comparison: Comparison) -> None:
    """Add the sections on what was found, in reading order.

    Args:
        document: The report; the figures of the comparison are in its folder.
        study: The study.
        comparison: Its results, compared.
    """
    document.section("Power")
    _write_power(document, comparison)
    document.section("Verdicts")
    _write_verdicts(document, study, comparison)
    document.section("Scores")
    write_scores(document, comparison)
    document.section("All pairs by task type")
    _write_pairs(document, comparison)
    document.section("Seed noise")
    _write_seeds(document, comparison)
    document.section("Ablations")
    options = [
        (option.label, label(option.design))
        for option in study.designs
        if option.option and option.design in study.labels
    ]
    below = "Each option changes one component of its design; first minus second, with p Holm."
    document.table(Sheet.of("Options against their plain design", outcomes(comparison, options), below))


def write_claims(document: Document, comparison: Comparison) -> None:
    """Add how each claim of the paper fares in the corrected tests; nothing if the study has none of its pairs.

    The designs are the paper's five, with our defaults (`1` to `5`) or with its settings (`paper-1` to `paper-5`).
    """
    rows = [
        {"Claim": text, **row}
        for prefix in ("", "paper-")
        for text, (first, second), types in CLAIMS
        for row in outcomes(comparison, [(prefix + first, prefix + second)], types)
    ]
    if rows:
        document.text(
            "Tang and Yang 2024 (arXiv 2409.02727) compare five designs: 1 causal attention with the last token, 2 and "
            "3 causal attention with a trained pooling over the last layer and over all layers, 4 and 5 these two with "
            "bidirectional attention. They also claim that no one design is best everywhere."
        )
        document.table(Sheet.of("Claims and results", rows))


def outcomes(
    comparison: Comparison, contrasts: Iterable[tuple[str, str]], types: Sequence[str] = ()
) -> Iterator[dict[str, str]]:
    """Yield a row per contrast (and base): what the tests say of its first design, a column per task type.

    Args:
        comparison: The comparison.
        contrasts: First and second design.
        types: The task types; all by default.
    """
    bases = dict.fromkeys(kind.base for kind in comparison.types)
    for first, second in contrasts:
        for base in bases:
            kinds = [kind for kind in comparison.types if kind.base == base and (kind.task_type in types or not types)]
            cells = {kind.task_type: _outcome(kind, first, second) for kind in kinds}
            if any(cells.values()):
                where = f", {base}" if len(bases) > 1 else ""
                yield {"Contrast": f"{first} - {second}{where}", **{name: cell or "-" for name, cell in cells.items()}}


def _outcome(kind: TypeComparison, first: str, second: str) -> str:
    """Return difference, corrected p-value and outcome of a contrast; empty if it was not tested."""
    pair = next((pair for pair in kind.pairs if {pair.first, pair.second} == {first, second}), None)
    if pair is None:
        return ""
    difference, outcome = pair.test.mean_difference, pair.outcome
    if pair.first != first:
        difference = -difference
        if pair.winner:
            turned = {"better": "worse", "worse": "better", "above": "below", "below": "above"}
            outcome = turned[outcome]
    named = "" if pair.confirmatory else " (exploratory)"
    return f"{outcome}{named}\n{difference:+.4f}, p {p_text(pair.p_holm)}"


def _write_power(document: Document, comparison: Comparison) -> None:
    rows, unreachable = [], []
    for kind in comparison.types:
        for family in kind.families:
            name = f"{kind.title}: {'pre-registered' if family.confirmatory else 'exploratory'}"
            plan = family.plan
            found = sorted(pair.detectable for pair in family.pairs if math.isfinite(pair.detectable))
            rows.append(
                {
                    "Table": name,
                    "Tasks": str(plan.tasks),
                    "Tests": str(plan.tests),
                    "Smallest p Holm": f"{plan.smallest_p:.3g}",
                    "Detectable, in SD": f"{plan.effect:.2f}" if plan.reachable else "none",
                    "Detectable, in score": f"{found[len(found) // 2]:.4f}" if found else "-",
                }
            )
            unreachable += [] if plan.reachable else [name]
    below = (
        "Smallest p Holm: the value if all tasks agree in sign, tests · 2^(1 - tasks). Detectable: the minimal "
        "detectable mean difference at 80 % power, in standard deviations of the differences between tasks, and in "
        "score with the observed spread (median over pairs)."
    )
    document.table(Sheet.of("Minimal detectable differences", rows, below))
    if unreachable:
        document.text(
            f"Significance cannot be reached whatever the scores are, so there are no marks: {'; '.join(unreachable)}.",
            warning=True,
        )


def _write_verdicts(document: Document, study: Study, comparison: Comparison) -> None:
    contrasts = study.contrasts or []
    present = {str(model) for kind in comparison.types for model in kind.scores}
    waiting = [contrast for contrast in contrasts if not set(contrast.split(":")) <= present]
    if contrasts:
        document.text(f"Verdicts rest on {counted(len(contrasts), 'pre-registered comparison')}.")
    else:
        document.text("No comparison was pre-registered, so every difference is exploratory and there is no verdict.")
    if waiting:
        document.text(
            f"Not tested yet because runs are missing: {', '.join(waiting)}. They will add to the correction.",
            warning=True,
        )
    pairs = [tuple(contrast.split(":", 1)) for contrast in contrasts]
    below = "First minus second, mean over tasks, with p Holm; the outcome is that of the first design."
    document.table(Sheet.of("Pre-registered comparisons", outcomes(comparison, pairs), below))  # type: ignore[arg-type]
    document.text(INDEPENDENCE)


def write_scores(document: Document, comparison: Comparison, *, marks: bool = True) -> None:
    """Add the table of mean scores, designs by task types, marked by the corrected tests.

    Args:
        document: The report.
        comparison: The comparison.
        marks: Show the marks.
    """
    bases = dict.fromkeys(kind.base for kind in comparison.types)
    for base in bases:
        kinds = [kind for kind in comparison.types if kind.base == base]
        models = list(dict.fromkeys(str(model) for kind in kinds for model in kind.scores))
        letters = dict(zip(models, string.ascii_letters, strict=False))
        rows = [{"Design": f"{letters[model]}: {model}" if marks else model} for model in models]
        for kind in kinds:
            complete = kind.scores.dropna()
            for row, model in zip(rows, models, strict=True):
                if model in complete and len(complete):
                    won = sorted(
                        (letters[str(p.loser)], p.confirmatory) for p in kind.pairs if marks and p.winner == model
                    )
                    named = [letter for letter, confirmatory in won if confirmatory]
                    others = " ".join(letter for letter, confirmatory in won if not confirmatory)
                    beaten = " ".join([*named, *([f"({others})"] if others else [])])
                    heading = f"{kind.task_type}\n{counted(len(complete), 'task')}"
                    row[heading] = f"{complete[model].mean():.4f}" + (f" > {beaten}" if beaten else "")
        document.table(Sheet.of("Mean score over tasks" + (f", {base}" if len(bases) > 1 else ""), rows))
    if marks:
        document.text(_MARKS)


def _write_pairs(document: Document, comparison: Comparison) -> None:
    document.text(
        "Pairs that were not pre-registered are exploratory: what stands out is a hypothesis for another study."
    )
    for kind in comparison.types:
        document.heading(kind.title)
        for family in kind.families:
            for sheet in sheets_of_family(kind, family):  # the exploratory table is long; the heat map has its marks
                document.table(sheet, shown=family is kind.families[0])
        path = document.folder / COMPARISON / slug(kind.title)
        marked = [f"{pair.winner} above {pair.loser}" for pair in kind.pairs if pair.winner]
        document.picture(
            Path(f"{path}_pairs.png"),
            alt=f"Heat map of the mean difference of every pair of designs on {kind.title}. With a verdict: "
            f"{'; '.join(marked) or 'none'}.",
            caption=f"{kind.title}: mean difference, row minus column; * significant, [ ] pre-registered.",
        )
        if kind.ranks is not None and Path(f"{path}_ranks.png").is_file():
            order = ", ".join(f"{model} {rank:.2f}" for model, rank in kind.ranks.mean_ranks.items())
            document.picture(
                Path(f"{path}_ranks.png"),
                alt=f"Diagram of mean ranks on {kind.title}: {order}.",
                caption=f"{kind.title}: mean ranks; bars join designs that the corrected pair tests do not separate.",
            )
        for line in about_type(kind):
            document.text(line)
    for line in footnotes(comparison):
        if line != INDEPENDENCE:
            document.text(line)


def _write_seeds(document: Document, comparison: Comparison) -> None:
    known = [(kind, kind.seeds) for kind in comparison.types if kind.seeds is not None]
    if not known:
        document.text("No design has two runs, so seed noise is unknown and no p-value covers it.")
        return
    rows = [
        {
            "Task type": kind.title,
            "Runs": str(sum(noise.runs.values())),
            "SD between seeds": f"{noise.sd_seeds:.4f}",
            "SD between designs": f"{noise.sd_designs:.4f}",
            "p": p_text(noise.p),
            "Least difference": f"{max(noise.least_difference(*two) for two in combinations(noise.runs, 2)):.4f}",
        }
        for kind, noise in known
        if len(noise.runs) > 1
    ]
    below = (
        "Runs are compared by their mean over tasks; seeds are nested in designs. SD between designs excludes seed "
        "noise. p: one-way analysis of variance. Least difference: 95 % of the differences that seeds alone make are "
        "smaller; no verdict is given below it."
    )
    document.table(Sheet.of("Seed noise and the variance of designs", rows, below))
    bases = dict.fromkeys(kind.base for kind in comparison.types)
    for base in dict.fromkeys(kind.base for kind, _ in known):
        kinds = [kind for kind in comparison.types if kind.base == base and kind.runs]
        _draw_runs(document, kinds, "runs" + (f"_{base}" if len(bases) > 1 else ""))


def _draw_runs(document: Document, kinds: Sequence[TypeComparison], name: str) -> None:
    from matplotlib.figure import Figure

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
    figure.axes[0].invert_yaxis()  # the panels share one y axis
    document.draw(
        figure,
        name,
        alt="Mean score of every run by design, one panel per task type: the dots of a row are seeds of one design.",
        caption="Each dot is a run, its mean score over tasks; the bar is the mean of the design. Rows whose dots "
        "overlap differ no more than seeds do.",
    )
