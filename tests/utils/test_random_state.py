from __future__ import annotations

import contextlib
import random
import subprocess
import sys

import numpy as np
import torch

from st_llmpool.utils.random_state import preserve_rng_state


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def test_random_state_is_the_same_after_seeding_inside():
    seed(1)
    expected = draw()
    seed(1)
    with preserve_rng_state():
        seed(42)
        draw()
    assert draw() == expected


def test_random_state_is_the_same_after_an_error_inside():
    seed(1)
    expected = draw()
    seed(1)
    with contextlib.suppress(KeyError), preserve_rng_state():
        seed(42)
        raise KeyError
    assert draw() == expected


def test_import_of_the_package_leaves_the_random_state():
    code = (
        "import random, numpy, torch; random.seed(1); numpy.random.seed(1); torch.manual_seed(1)\n"
        "from st_llmpool.evaluation import evaluate\n"
        "print(random.random(), numpy.random.rand(), float(torch.rand(())), torch.initial_seed())"
    )
    seed(1)
    expected = " ".join(str(value) for value in (*draw(), 1))
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == expected
