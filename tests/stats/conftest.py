from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.clean import clean_run  # noqa: F401
from tests.stats.validation import DESIGNS, simulated_scores


@pytest.fixture
def study() -> pd.DataFrame:
    """Six designs, twelve tasks, three seeds."""
    rng = np.random.default_rng(8)
    return simulated_scores(rng, DESIGNS, tasks=12, seeds=3, seed_noise=0.001, effect=0.02)
