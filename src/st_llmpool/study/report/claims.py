"""Claims of the paper about its five designs, and whether the tests of a study support them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...stats.comparison import Comparison, Pair
from ...stats.tables import Sheet, p_text
from .document import Document

_SEARCH_AND_SIMILARITY = ("STS", "Retrieval")


@dataclass(frozen=True)
class Claim:
    """One claim of Tang and Yang 2024 (arXiv 2409.02727) about two of its designs.

    Args:
        text: The claim.
        pair: The designs that it compares.
        task_types: Task types that it is about.
        better: Whether it says that the first is better, or that it is not.
    """

    text: str
    pair: tuple[str, str]
    task_types: tuple[str, ...] = _SEARCH_AND_SIMILARITY
    better: bool = True


CLAIMS = (
    Claim(
        "Bidirectional attention with a trained pooling is better than causal attention with the last token on "
        "similarity and search.",
        ("5", "1"),
    ),
    Claim(
        "It is not better than that on classification and clustering.",
        ("5", "1"),
        ("Classification", "Clustering"),
        better=False,
    ),
    Claim("Pooling over all layers is better than over the last one, with bidirectional attention.", ("5", "4")),
    Claim("Pooling over all layers is better than over the last one, with causal attention.", ("3", "2")),
)
_NO_SINGLE_BEST = "No one design is best everywhere."


def write_claims(document: Document, comparison: Comparison) -> None:
    """Add how each claim fares by the same corrected tests as all verdicts; nothing if the study has none of the pairs.

    The designs are the paper's five, with our defaults (`1` to `5`) or with its settings (`paper-1` to `paper-5`).
    """
    rows = [row for prefix in ("", "paper-") for row in _rows(comparison, prefix)]
    if rows:
        document.text(
            "Tang and Yang 2024 (arXiv 2409.02727) compare five designs: 1 causal attention with the last token, 2 and "
            "3 causal attention with a trained pooling over the last layer and over all layers, 4 and 5 these two with "
            "bidirectional attention."
        )
        columns = ("Claim", "Designs", "Tasks", "Difference", "p Holm", "Here")
        below = ("expl.: the comparison was not pre-registered.",)
        document.table(Sheet("Claims and results", columns, tuple(rows), below))


def _rows(comparison: Comparison, prefix: str) -> Iterator[tuple[str, ...]]:
    for claim in CLAIMS:
        text = claim.text
        first, second = (prefix + name for name in claim.pair)
        for kind in comparison.types:
            pair = next((pair for pair in kind.pairs if {pair.first, pair.second} == {first, second}), None)
            if pair is None or kind.task_type not in claim.task_types:
                continue
            sign = 1 if pair.first == first else -1
            p = p_text(pair.p_holm) + ("" if pair.confirmatory else " (expl.)")
            difference = f"{sign * pair.test.mean_difference:+.4f}"
            here = outcome(pair, first, better=claim.better)
            yield text, f"{first} - {second}", kind.title, difference, p, here
            text = ""
    if len(comparison.types) > 1:
        yield from _no_single_best(comparison, [f"{prefix}{number}" for number in range(1, 6)])


def outcome(pair: Pair, first: str, *, better: bool) -> str:
    """Return what a pair's test says about the claim that `first` is, or is not, better than the other.

    Args:
        pair: The pair, in either order.
        first: The design that the claim is about.
        better: Whether it is claimed to be better.
    """
    if pair.winner == first:
        return "Holds." if better else "Does not hold: it is better."
    if pair.winner is not None:
        return "Does not hold: it is worse." if better else "Holds: it is worse."
    if not pair.reachable:
        return "Undecided: too few tasks."
    if pair.significant:
        return "Undecided: significant over tasks, but within seed noise or contradictory."
    if better:
        return f"Not seen; minimal detectable difference {pair.detectable:.2g}."
    return f"Not contradicted; minimal detectable difference {pair.detectable:.2g}."


def _no_single_best(comparison: Comparison, designs: list[str]) -> Iterator[tuple[str, ...]]:
    """Yield whether two designs change places between task types, or one is above all others in every one."""
    won = {
        kind.title: {
            (pair.winner, pair.loser)
            for pair in kind.pairs
            if pair.winner and {pair.first, pair.second} <= set(designs)
        }
        for kind in comparison.types
    }
    present = [design for design in designs if all(design in kind.scores for kind in comparison.types)]
    if len(present) < 2:
        return
    for title, pairs in won.items():
        for winner, loser in sorted(pairs, key=str):
            other = next((other for other in won if (loser, winner) in won[other]), None)
            if other is not None:
                text = f"Holds: {winner} is above {loser} on {title}, and below it on {other}."
                yield _NO_SINGLE_BEST, f"{winner}, {loser}", f"{title}, {other}", "", "", text
                return
    text = "Not seen: no two designs change places significantly."
    for design in present:
        if all({(design, other) for other in present if other != design} <= pairs for pairs in won.values()):
            text = f"Does not hold: {design} is above all others on every task type."
    yield _NO_SINGLE_BEST, ", ".join(present), "all", "", "", text
