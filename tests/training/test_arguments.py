"""The trainer's arguments: precision, memory, processes, and refusals in one line."""

import logging

import pytest
import torch
from transformers import AutoModel, TrainingArguments

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import train
from st_llmpool.training.arguments import (
    dtype_of,
    enable_gradient_checkpointing,
    precision_of,
    shared_arguments,
    trainer_arguments,
)
from st_llmpool.training.recipe import TrainingSettings


def test_a_value_that_the_trainer_refuses_is_one_line(make_recipe):
    with pytest.raises(ConfigurationError, match=r"^The settings under training are refused: .*cosinus"):
        train(make_recipe({"training": {"lr_scheduler_type": "cosinus"}}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "training.lr_scheduler_type=nothing",
            "settings under training are refused: nothing is not a valid SchedulerType",
        ),
        ("training.lr_scheduler_type=reduce_lr_on_plateau", "are refused: .*requires an eval strategy"),
        (
            "training.lr_scheduler_type=warmup_stable_decay",
            "training.lr_scheduler_type=warmup_stable_decay cannot be used here: .*num_decay",
        ),
        ("training.optim=adamw_torch_xla", "training.optim=adamw_torch_xla cannot be used here: .*torch_xla"),
        ("model.attn_implementation=nothing", "cannot be built with model.attn_implementation=nothing"),
        ("model.attn_implementation=flash_attention_2", "cannot be built with model.attn_implementation=flash_att"),
    ],
)
def test_what_transformers_refuses_is_one_line_of_ours(make_recipe, setting, message):
    with pytest.raises(ConfigurationError, match=message) as refusal:
        train(make_recipe({}, setting))
    assert "\n" not in str(refusal.value)


def test_the_settings_of_a_recipe_reach_the_trainer_and_its_own_names_win(tmp_path):
    training = TrainingSettings(
        max_steps=7, batch_size=6, warmup_steps=3.0, max_grad_norm=0.5, arguments={"adam_beta2": 0.9}
    )
    found = trainer_arguments(TrainingArguments, **shared_arguments(training, tmp_path, learning_rate=1e-4, seed=3))
    assert (found.max_steps, found.per_device_train_batch_size, found.seed) == (7, 6, 3)
    assert (found.learning_rate, found.max_grad_norm, found.adam_beta2) == (1e-4, 0.5, 0.9)
    assert found.get_warmup_steps(7) == 3
    assert found.accelerator_config.split_batches  # each batch is split over the processes
    assert found.report_to == []
    assert found.output_dir == str(tmp_path / "checkpoints")


def test_of_several_gpus_a_process_uses_one_and_says_so(tmp_path, caplog):
    class Several(TrainingArguments):
        @property
        def n_gpu(self):
            return 2

    with caplog.at_level(logging.WARNING):
        found = trainer_arguments(Several, output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert vars(found)["_n_gpu"] == 1
    assert "accelerate launch" in caplog.text


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_is_bf16_on_a_gpu_that_has_it_and_fp32_elsewhere(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert precision_of("auto") == ("bf16" if has_bf16 else "fp32")
    assert dtype_of("auto") is (torch.bfloat16 if has_bf16 else torch.float32)
    assert dtype_of("fp16") is torch.float16


def test_gradient_checkpointing_gives_the_gradients_of_the_plain_model(tiny_llm):
    gradients = []
    for recomputes in (False, True):
        model = AutoModel.from_pretrained(tiny_llm).train()
        if recomputes:
            enable_gradient_checkpointing(model)
            assert model.is_gradient_checkpointing
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).last_hidden_state.square().sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
