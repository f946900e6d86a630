from __future__ import annotations

import subprocess
import sys


def test_the_columns_of_results_are_known_without_heavy_imports():
    code = "import sys; from st_llmpool.stats.results import COLUMNS, label; print(label('5', 'x'))"
    code += "; print([name for name in ('torch', 'pandas', 'scipy', 'mteb') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n") == ["5 (x)", "[]", ""]
