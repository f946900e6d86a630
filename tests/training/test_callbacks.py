import io

from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from st_llmpool.training.callbacks import RichProgress


def show(*, is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
    progress = RichProgress(console)
    args, state, control = TrainingArguments(output_dir="unused"), TrainerState(max_steps=4), TrainerControl()
    progress.on_train_begin(args, state, control)
    state.global_step = 2
    progress.on_step_end(args, state, control)
    logs = {"loss": 1.5, "learning_rate": 1e-4, "pooling_share": 0.02}
    state.log_history.append(logs)
    progress.on_log(args, state, control, logs=logs)
    progress.on_log(args, state, control, logs={"eval_ndcg": 0.25, "eval_runtime": 3.0})
    progress.on_log(args, state, control, logs={"train_runtime": 9.0, "train_loss": 1.0})
    progress.on_train_end(args, state, control)
    return console.file.getvalue()


def test_without_a_terminal_each_log_entry_is_one_line():
    assert show(is_terminal=False).rstrip().splitlines() == [  # rich 14.0 ends with an empty line
        "step 2/4  loss 1.5000  lr 1.0e-04  pooling changes the embedding by 2.0 %",
        "step 2/4  ndcg 0.2500",
    ]


def test_a_terminal_shows_steps_numbers_and_the_time_left():
    text = show(is_terminal=True)
    assert all(
        part in text
        for part in (
            "2/4",
            "loss 1.5000",
            "lr 1.0e-04",
            "pooling changes the embedding by 2.0 %",
            "left",
            "ndcg 0.2500",
        )
    )
