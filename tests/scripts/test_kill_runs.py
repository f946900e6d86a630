"""The short form of scripts/kill_runs.py: what is killed and resumed equals what was never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_killed_run_is_resumed_to_the_same_bits_and_a_second_one_in_its_folder_is_refused():
    command = [sys.executable, "scripts/kill_runs.py", "--kinds", "two", "lora", "--kills", "1", "--steps", "6"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "2 of 2"
