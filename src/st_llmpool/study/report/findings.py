"""What the tests found: power first, then verdicts, then the tables that they rest on."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...stats.compare import Comparison, Family, Pair, TypeComparison, label
from ...stats.plots import has_ranks
from ...stats.tables import INDEPENDENCE, Sheet, about_type, file_name, footnotes, p_text, sheets_of_family
from ...utils.words import counted
from ..settings import Study
from .claims import claims_sheet
from .document import Block, Bullets, Heading, Picture, Section, Table, Text, save_picture

COMPARISON = "comparison"  # folder that `tables.write` filled


def findings(study: Study, comparison: Comparison, folder: Path) -> list[Section]:
    """Returns the sections on what was found, in the order in which they should be read.

    Args:
        study: The study.
        comparison: Its results, compared.
        folder: Of the report; the pictures of the comparison are there, others are drawn.
    """
    return [
        Section("What the study could find at best", _power(comparison)),
        Section("Verdicts", _verdicts(study, comparison)),
        Section("Scores", [*(Table(sheet, marked=True) for sheet in scores_sheets(comparison)), Text(_MARKS)]),
        Section("The claims of the paper", _claims(comparison)),
        Section("Every pair, by task type", list(_pairs(comparison, folder))),
        Section("Noise of seeds", _seeds(comparison, folder)),
        Section("Ablations", _ablations(study, comparison)),
    ]


_MARKS = (
    "> c: better than design c in a test over tasks that was named beforehand, corrected by Holm, and by more than "
    "seeds alone can make. > (c): the same in an exploratory test, to be confirmed on other data. No mark: no "
    "difference that this study can see."
)


def scores_sheets(comparison: Comparison) -> list[Sheet]:
    """Returns one table for each base, as in the paper: designs by task types, marked by the corrected tests."""
    return [_scores(comparison, base) for base in dict.fromkeys(kind.base for kind in comparison.types)]


def verdict(kind: TypeComparison) -> str:
    """Returns what the pairs named beforehand say of one task type, in one sentence."""
    pairs = [pair for pair in kind.pairs if pair.confirmatory]
    if not pairs:
        return "no pair was named beforehand, so there is no verdict."
    if not any(pair.reachable for pair in pairs):
        tasks = max(pair.test.n for pair in pairs)
        return f"cannot tell; {counted(tasks, 'task')} cannot give a significant result."
    parts = _won(pairs)
    unclear = [_both(pair) for pair in pairs if pair.significant and pair.winner is None]
    if unclear:
        parts.append(f"no verdict on {_list(unclear)}, whose difference seeds or spread may have made")
    unseen = [pair for pair in pairs if pair.reachable and not pair.significant]
    if unseen:
        which = _list([_both(pair) for pair in unseen]) if len(unseen) < len(pairs) else "any of the named pairs"
        parts.append(f"no difference that this study can see in {which} ({_would_find(unseen)})")
    hopeless = [_both(pair) for pair in pairs if not pair.reachable]
    if hopeless:
        parts.append(f"too few tasks for {_list(hopeless)}")
    return "; ".join(parts) + "."


def exploratory_verdict(kind: TypeComparison) -> str:
    """Returns what all other pairs say, in one sentence."""
    pairs = [pair for pair in kind.pairs if not pair.confirmatory]
    if not pairs:
        return "there is no other pair."
    if not any(pair.reachable for pair in pairs):
        return f"{counted(len(pairs), 'pair')} on so few tasks cannot give a significant result."
    parts = _won(pairs, "above")
    if not parts:
        return f"none of {counted(len(pairs), 'pair')} stands out."
    return f"of {counted(len(pairs), 'pair')}, " + "; ".join(parts) + "."


def _won(pairs: Sequence[Pair], words: str = "better than") -> list[str]:
    won: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.winner is not None:
            text = f"{pair.loser} (by {abs(pair.test.mean_difference):.2g})"
            won.setdefault(pair.winner, []).append(text)
    return [f"{winner} is {words} {_list(losers)}" for winner, losers in won.items()]


def _would_find(pairs: Sequence[Pair]) -> str:
    found = sorted(f"{pair.detectable:.2g}" for pair in pairs)
    span = found[0] if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
    return f"at 80 % power it finds {span} or more"


def _both(pair: Pair) -> str:
    return f"{pair.first} against {pair.second}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _power(comparison: Comparison) -> list[Block]:
    rows = [
        (
            f"{kind.title}: {'named beforehand' if family.confirmatory else 'exploratory'}",
            str(family.plan.tasks),
            str(family.plan.tests),
            f"{family.plan.smallest_p:.3g}",
            f"{family.plan.effect:.2f}" if family.plan.reachable else "nothing",
            _median_detectable(family),
        )
        for kind in comparison.types
        for family in kind.families
    ]
    columns = ("Table", "Tasks", "Tests", "Smallest p Holm", "Finds, in SD", "Finds, in score")
    below = (
        "Smallest p Holm: what the table reaches if every task goes the same way, tests · 2^(1 - tasks). Finds: the "
        "mean difference that it finds at 80 % power, in standard deviations of the differences between tasks, and in "
        "score with the spread that was seen (median of the pairs).",
    )
    sheet = Sheet("What each table could find", columns, tuple(rows), below)
    blocks: list[Block] = [Table(sheet)]
    hopeless = [
        row[0]
        for row, family in zip(rows, (family for kind in comparison.types for family in kind.families), strict=True)
        if not family.plan.reachable
    ]
    if hopeless:
        blocks.append(
            Text(
                f"Unable to reach significance whatever the scores are, and without marks: {'; '.join(hopeless)}.",
                warning=True,
            )
        )
    return blocks


def _median_detectable(family: Family) -> str:
    found = sorted(pair.detectable for pair in family.pairs if math.isfinite(pair.detectable))
    return f"{found[len(found) // 2]:.4f}" if found else "-"


def _verdicts(study: Study, comparison: Comparison) -> list[Block]:
    contrasts = study.contrasts or []
    present = {str(model) for kind in comparison.types for model in kind.scores}
    waiting = [contrast for contrast in contrasts if not set(contrast.split(":")) <= present]
    blocks: list[Block] = [
        Text(
            f"Verdicts rest on {counted(len(contrasts), 'contrast')} named before anything ran: {', '.join(contrasts)}."
        )
        if contrasts
        else Text("No contrast was named beforehand, so every difference below is exploratory."),
    ]
    if waiting:
        text = f"Not tested yet, for want of finished runs: {', '.join(waiting)}. The correction will grow with them."
        blocks.append(Text(text, warning=True))
    blocks += [
        Bullets(tuple((kind.title, verdict(kind)) for kind in comparison.types)),
        Heading("Exploratory: all other pairs"),
        Text("These were not named beforehand. What stands out here is a suggestion for another study."),
        Bullets(tuple((kind.title, exploratory_verdict(kind)) for kind in comparison.types)),
        Text(INDEPENDENCE),
    ]
    return blocks


def _scores(comparison: Comparison, base: str) -> Sheet:
    kinds = [kind for kind in comparison.types if kind.base == base]
    models = list(dict.fromkeys(str(model) for kind in kinds for model in kind.scores))
    letters = {model: string.ascii_letters[place] for place, model in enumerate(models)}
    complete = {kind.task_type: kind.scores.dropna() for kind in kinds}
    rows = tuple(
        (
            f"{letters[model]}: {model}",
            *(
                f"{complete[kind.task_type][model].mean():.4f}{_beaten(kind, model, letters)}"
                if model in kind.scores and len(complete[kind.task_type])
                else "-"
                for kind in kinds
            ),
        )
        for model in models
    )
    columns = (f"{name}\n{counted(len(table), 'task')}" for name, table in complete.items())
    title = "Mean score over tasks" + (f", {base}" if len({kind.base for kind in comparison.types}) > 1 else "")
    return Sheet(title, ("Design", *columns), rows)


def _beaten(kind: TypeComparison, model: str, letters: Mapping[str, str]) -> str:
    won = [pair for pair in kind.pairs if pair.winner == model and pair.loser is not None]
    marks = sorted((letters[str(pair.loser)], pair.confirmatory) for pair in won)
    named = [letter for letter, confirmatory in marks if confirmatory]
    others = [letter for letter, confirmatory in marks if not confirmatory]
    parts = [*named, *([f"({' '.join(others)})"] if others else [])]
    return f" > {' '.join(parts)}" if parts else ""


def _claims(comparison: Comparison) -> list[Block]:
    sheet = claims_sheet(comparison)
    if sheet is None:
        return []
    return [
        Text(
            "Tang and Yang 2024 (arXiv 2409.02727) compare five designs: 1 causal attention with the last token, 2 and "
            "3 the same attention with a trained pooling over the last layer and over all layers, 4 and 5 these two "
            "with bidirectional attention. How their claims fare here, by the same corrected tests (expl.: an "
            "exploratory one):"
        ),
        Table(sheet),
    ]


def _pairs(comparison: Comparison, folder: Path) -> Iterator[Block]:
    for kind in comparison.types:
        yield Heading(kind.title)
        for family in kind.families:
            shown = family is kind.families[0]  # the exploratory table is long, and the heatmap has its marks
            yield from (Table(sheet, shown=shown) for sheet in sheets_of_family(kind, family))
        name = folder / COMPARISON / file_name(kind.title)
        marked = [f"{pair.winner} above {pair.loser}" for pair in kind.pairs if pair.winner]
        yield Picture(
            Path(f"{name}_pairs.png"),
            f"Heatmap of the mean difference of every pair of designs on {kind.title}. "
            f"With a verdict: {'; '.join(marked) or 'none'}.",
            f"{kind.title}: mean difference of every pair, row minus column; * significant, [ ] named beforehand.",
        )
        if kind.ranks is not None and has_ranks(kind):
            order = ", ".join(f"{model} {rank:.2f}" for model, rank in kind.ranks.mean_ranks.items())
            yield Picture(
                Path(f"{name}_critical_difference.png"),
                f"Critical-difference diagram of mean ranks on {kind.title}: {order}.",
                f"{kind.title}: mean ranks; designs under one bar are not told apart by the Nemenyi test.",
            )
        yield from (Text(line) for line in about_type(kind))
    yield from (Text(line) for line in footnotes(comparison) if line != INDEPENDENCE)


def _seeds(comparison: Comparison, folder: Path) -> list[Block]:
    known = [(kind, kind.seeds) for kind in comparison.types if kind.seeds is not None]
    if not known:
        return [Text("No design has two runs, so the noise of seeds is not known and no p-value covers it.")]
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
        "Runs are compared by their mean over tasks; seeds are nested in designs. SD between designs is without the "
        "part that seeds make. p: one-way analysis of variance. Least difference: means of two designs that differ by "
        "less differ no more than two draws of seeds do, at 95 %; no verdict is given below it.",
    )
    return [
        Text("A difference smaller than what another seed makes is not sold as one."),
        Table(Sheet("Noise of seeds beside the variance of designs", columns, rows, below)),
        *(_draw_runs(comparison, base, folder) for base in dict.fromkeys(kind.base for kind, _ in known)),
    ]


def _draw_runs(comparison: Comparison, base: str, folder: Path) -> Picture:
    from matplotlib.figure import Figure

    kinds = [kind for kind in comparison.types if kind.base == base and kind.runs]
    models = list(dict.fromkeys(model for kind in kinds for model in kind.runs))
    columns = 2 if len(kinds) > 1 else 1
    height = 0.9 + 0.24 * len(models)
    figure = Figure(figsize=(8, math.ceil(len(kinds) / columns) * height), layout="constrained")
    panels = figure.subplots(math.ceil(len(kinds) / columns), columns, squeeze=False, sharey=True).flat
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
    figure.axes[0].invert_yaxis()  # they share the axis
    name = "runs" + (f"_{base}" if len({kind.base for kind in comparison.types}) > 1 else "")
    return save_picture(
        figure,
        folder / "figures" / f"{file_name(name)}.png",
        alt="Mean score of every run by design, one panel for each task type: dots of one row are seeds of one design.",
        caption="Each dot is a run, its mean score over tasks; the bar is the mean of the design. Rows whose dots "
        "overlap differ no more than seeds do.",
    )


def _ablations(study: Study, comparison: Comparison) -> list[Block]:
    labels = set(study.labels)
    options = [design for design in study.designs if design.option and design.design in labels]
    rows = []
    for base in dict.fromkeys(kind.base for kind in comparison.types):
        kinds = [kind for kind in comparison.types if kind.base == base]
        for design in options:
            cells = [_change(kind, design.label, label(design.design)) for kind in kinds]
            if any(cell != "-" for cell in cells):
                rows.append((design.label if base == kinds[0].base else f"{design.label} {base}", *cells))
    if not rows:
        return []
    types = dict.fromkeys(kind.task_type for kind in comparison.types)
    below = ("Difference of the option from its plain design, with p Holm; * and a verdict as in the tables of pairs.",)
    return [
        Text("Each option changes one ingredient of its design. These tests are exploratory unless marked (named)."),
        Table(Sheet("Options against their plain design", ("Option", *types), tuple(rows), below)),
    ]


def _change(kind: TypeComparison, option: str, plain: str) -> str:
    pair = next((pair for pair in kind.pairs if {pair.first, pair.second} == {option, plain}), None)
    if pair is None:
        return "-"
    difference = pair.test.mean_difference if pair.first == option else -pair.test.mean_difference
    named = " (named)" if pair.confirmatory else ""
    return f"{difference:+.4f}{'*' if pair.winner else ''}\np {p_text(pair.p_holm)}{named}"
