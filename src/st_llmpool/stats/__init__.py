"""Which design is better, told honestly: results in one table, paired tests, and what they could find at best."""

from __future__ import annotations

from ..utils.extras import needs

with needs("eval", "Comparing results"):
    from .compare import Comparison, Family, Pair, TypeComparison, compare
    from .power import Plan, detectable_effect, detectable_item_effect, power
    from .readers import read_results, read_task_types
    from .results import COLUMNS, ITEM_COLUMNS, Results
    from .statistics import (
        ItemTest,
        PairedTest,
        RankTest,
        SeedNoise,
        holm,
        item_test,
        paired_test,
        rank_test,
        seed_noise,
    )

__all__ = [
    "COLUMNS",
    "ITEM_COLUMNS",
    "Comparison",
    "Family",
    "ItemTest",
    "Pair",
    "PairedTest",
    "Plan",
    "RankTest",
    "Results",
    "SeedNoise",
    "TypeComparison",
    "compare",
    "detectable_effect",
    "detectable_item_effect",
    "holm",
    "item_test",
    "paired_test",
    "power",
    "rank_test",
    "read_results",
    "read_task_types",
    "seed_noise",
]
