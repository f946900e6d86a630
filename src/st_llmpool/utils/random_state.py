"""Preserve the global random state: evaluators draw from it, and mteb reseeds it on import and with every task.

Otherwise an evaluation during training changes the later order of the data and the dropout masks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the random state of Python, numpy and torch (CPU and CUDA) at the end, also after an error."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda_started = torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda_started else ()):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if not cuda_started:  # a seed set before CUDA starts is queued, and the last one queued wins
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; at the end every submodule's mode and the random state are what they were."""
    modes = {module: module.training for module in model.modules()}
    with preserve_rng_state(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
