"""The worked examples of Demšar 2006 (JMLR 7, tables 2 and 6): AUC of C4.5 and three variants on 14 data sets."""

from __future__ import annotations

import pandas as pd

AUC = pd.DataFrame(
    {
        "C4.5": [0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1.0, 0.940, 0.619, 0.972, 0.957],
        "C4.5+m": [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.0, 0.962, 0.666, 0.981, 0.978],
        "C4.5+cf": [0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609, 0.563, 0.866, 1.0, 0.965, 0.614, 0.9751, 0.946],
        "C4.5+m+cf": [0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685, 0.625, 0.875, 1.0, 0.962, 0.669, 0.975, 0.970],
    }
)  # the paper ranks the third above the fourth on "voting", where both round to 0.975
MEAN_RANKS = {"C4.5+m+cf": 1.964, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5": 3.143}
# Every group of t tied ranks in a row takes t³ - t from N (k³ - k): three pairs, and four alike on "mushroom".
TIE_CORRECTION = 1 - (3 * (2**3 - 2) + (4**3 - 4)) / (14 * (4**3 - 4))
