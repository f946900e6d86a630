"""The trainer of masked next-token prediction: losses are means over the masked tokens of a step."""

import json

import torch

from st_llmpool.training import adapt

from .test_adaptation import make


def test_accumulated_batches_are_averaged(tiny_lm, words_file, tmp_path):
    """Each text has one masked token, so two batches of 2 have the loss and the gradient of one batch of 4."""
    masking, training = {"mlm_probability": 0.01}, {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1}
    of = {}
    for size, batches in ((4, 1), (2, 2)):
        values = training | {"batch_size": size, "gradient_accumulation_steps": batches, "max_grad_norm": 1e-3}
        recipe = make(tmp_path / str(size), tiny_lm, words_file, masking=masking, tune="full", training=values)
        result = adapt(recipe)
        log = json.loads(next((tmp_path / str(size)).glob("checkpoints/*/trainer_state.json")).read_text())[
            "log_history"
        ]
        of[size] = [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry], result.report["steps"]
    assert of[4][1] == of[2][1] == 2
    torch.testing.assert_close(torch.tensor(of[2][0]), torch.tensor(of[4][0]), rtol=1e-4, atol=1e-5)
