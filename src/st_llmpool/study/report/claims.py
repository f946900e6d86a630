"""What the paper claims of its five designs, and whether the tests of a study bear it out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...stats.compare import Comparison, Pair, TypeComparison
from ...stats.tables import Sheet, p_text

_SEARCH_AND_SIMILARITY = ("STS", "Retrieval")
_GROUPS = ("Classification", "Clustering")


@dataclass(frozen=True)
class Claim:
    """One claim of Tang and Yang 2024 (arXiv 2409.02727) on two of its designs.

    Args:
        text: The claim.
        pair: The designs that it compares.
        task_types: What it is made for.
        better: Whether it says that the first is better, or that it is not.
    """

    text: str
    pair: tuple[str, str]
    task_types: tuple[str, ...]
    better: bool = True


CLAIMS = (
    Claim(
        "Bidirectional attention with a trained pooling is better than causal attention with the last token on "
        "similarity and search.",
        ("5", "1"),
        _SEARCH_AND_SIMILARITY,
    ),
    Claim("It is not better than that on classification and clustering.", ("5", "1"), _GROUPS, better=False),
    Claim(
        "Pooling over all layers is better than over the last one, with bidirectional attention.",
        ("5", "4"),
        _SEARCH_AND_SIMILARITY,
    ),
    Claim(
        "Pooling over all layers is better than over the last one, with causal attention.",
        ("3", "2"),
        _SEARCH_AND_SIMILARITY,
    ),
)

_NO_SINGLE_BEST = "No one design is best everywhere."


def claims_sheet(comparison: Comparison) -> Sheet | None:
    """Returns how each claim fares, from the same tests as all verdicts; None if the study has none of the pairs.

    The designs are the paper's five, with our defaults (`1` to `5`) or with its settings (`paper-1` to `paper-5`).
    """
    rows = [row for prefix in ("", "paper-") for row in _rows(comparison, prefix)]
    if not rows:
        return None
    columns = ("Claim", "Designs", "Tasks", "Difference", "p Holm", "Here")
    return Sheet("How each claim fares", columns, tuple(rows))


def _rows(comparison: Comparison, prefix: str) -> Iterator[tuple[str, ...]]:
    for claim in CLAIMS:
        text = claim.text
        for kind in comparison.types:
            pair = _find(kind, prefix + claim.pair[0], prefix + claim.pair[1])
            if pair is None or kind.task_type not in claim.task_types:
                continue
            sign = 1 if pair.first == prefix + claim.pair[0] else -1
            yield (
                text,
                " - ".join(prefix + name for name in claim.pair),
                kind.title,
                f"{sign * pair.test.mean_difference:+.4f}",
                p_text(pair.p_holm) + ("" if pair.confirmatory else " (expl.)"),
                outcome(pair, prefix + claim.pair[0], better=claim.better),
            )
            text = ""
    if len(comparison.types) > 1:
        yield from _no_single_best(comparison, [f"{prefix}{number}" for number in range(1, 6)])


def outcome(pair: Pair, first: str, *, better: bool) -> str:
    """Returns what a pair's test says of the claim that `first` is, or is not, better than the other.

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
        return "Cannot be told from so few tasks."
    if pair.significant:
        return "Undecided: significant over tasks, but seeds or spread forbid a verdict."
    if better:
        return f"Not seen; {pair.detectable:.2g} or more would have been."
    return f"Not contradicted; only {pair.detectable:.2g} or more would have been seen."


def _no_single_best(comparison: Comparison, designs: list[str]) -> Iterator[tuple[str, ...]]:
    """Yields whether two designs change places between task types, or one is above all others in every one."""
    won = {
        kind.title: {(pair.winner, pair.loser) for pair in kind.pairs if {pair.first, pair.second} <= set(designs)}
        for kind in comparison.types
    }
    present = [design for design in designs if all(design in kind.scores for kind in comparison.types)]
    if len(present) < 2:
        return
    for title, pairs in won.items():
        for winner, loser in pairs - {(None, None)}:
            other = next((other for other in won if (loser, winner) in won[other]), None)
            if other is not None:
                text = f"Holds: {winner} is above {loser} on {title}, and below it on {other}."
                yield _NO_SINGLE_BEST, f"{winner}, {loser}", f"{title}, {other}", "", "", text
                return
    for design in present:
        if all({(design, other) for other in present if other != design} <= pairs for pairs in won.values()):
            text = f"Does not hold: {design} is above all others on every task type."
            yield _NO_SINGLE_BEST, ", ".join(present), "all", "", "", text
            return
    yield _NO_SINGLE_BEST, ", ".join(present), "all", "", "", "Not seen: no two designs change places significantly."


def _find(kind: TypeComparison, first: str, second: str) -> Pair | None:
    return next((pair for pair in kind.pairs if {pair.first, pair.second} == {first, second}), None)
