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
    values = shared_arguments(training, tmp_path, learning_rate=1e-4, seed=3, width=16)
    found = trainer_arguments(TrainingArguments, **values)
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
def test_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert precision_of("auto", 64) == ("bf16" if has_bf16 else "fp32")
    assert precision_of("fp16", 64) == "fp16"


@pytest.mark.parametrize(("speedup", "width", "expected"), [(2.5, 640, "bf16"), (0.5, 640, "fp32"), (2.5, 256, "fp32")])
def test_auto_on_a_cpu_is_bf16_for_wide_bases_if_the_cpu_is_faster_with_it(monkeypatch, speedup, width, expected):
    clock = iter([time for run in range(10) for time in (9 * run, 9 * run + speedup, 9 * run + 4, 9 * run + 5)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("st_llmpool.training.arguments.time.perf_counter", lambda: next(clock))
    assert precision_of("auto", width) == expected


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_frozen_weights_have_the_dtype_of_the_trainers_precision(tmp_path, precision, dtype):
    training = TrainingSettings(max_steps=1, precision=precision)
    values = shared_arguments(training, tmp_path, learning_rate=1e-4, seed=3, width=16)
    assert dtype_of(trainer_arguments(TrainingArguments, **values | {"use_cpu": True})) is dtype


def test_an_adapter_trains_in_bf16_on_a_cpu_nearly_as_in_float32(tmp_path, make_recipe):
    losses = {}
    for precision in ("fp32", "bf16"):
        recipe = make_recipe(
            {"output_dir": str(tmp_path / precision)}, "model.tune=lora", f"training.precision={precision}"
        )
        result = train(recipe)
        losses[precision] = [loss for step, loss in result.report["losses"]]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


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
