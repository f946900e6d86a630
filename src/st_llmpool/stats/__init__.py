"""Which design is better: results in one table, paired tests, and their power."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..utils.extras import needs

if TYPE_CHECKING:
    from .comparison import Comparison, Family, Pair, TypeComparison, compare
    from .power_analysis import Plan, detectable_effect, detectable_item_effect, power
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

_FILES = {
    "COLUMNS": ".results",
    "ITEM_COLUMNS": ".results",
    "Comparison": ".comparison",
    "Family": ".comparison",
    "ItemTest": ".statistics",
    "Pair": ".comparison",
    "PairedTest": ".statistics",
    "Plan": ".power_analysis",
    "RankTest": ".statistics",
    "Results": ".results",
    "SeedNoise": ".statistics",
    "TypeComparison": ".comparison",
    "compare": ".comparison",
    "detectable_effect": ".power_analysis",
    "detectable_item_effect": ".power_analysis",
    "holm": ".statistics",
    "item_test": ".statistics",
    "paired_test": ".statistics",
    "power": ".power_analysis",
    "rank_test": ".statistics",
    "read_results": ".readers",
    "read_task_types": ".readers",
    "seed_noise": ".statistics",
}


def __getattr__(name: str) -> object:
    if name in _FILES:  # on first use: importing scipy and statsmodels takes seconds
        with needs("eval", "Comparing results"):
            return getattr(importlib.import_module(_FILES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
