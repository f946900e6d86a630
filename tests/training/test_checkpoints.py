import json
import zipfile
from pathlib import Path

import pytest

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training.checkpoints import last_checkpoint, processes_of
from st_llmpool.training.run_folder import check_output


def write(folder: Path, step: int, ranks: tuple[str, ...] = ("",)) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in (*(f"rng_state{rank}.pth" for rank in ranks), "optimizer.pt", "scheduler.pt"):
        with zipfile.ZipFile(checkpoint / name, "w") as file:
            file.writestr("data", "x" * 100)
    return checkpoint


def test_the_newest_checkpoint_is_found_by_its_number(tmp_path):
    for step in (90, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_without_any_checkpoint_there_is_none(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["no state", "half state", "no random state", "half random state"])
def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path, damage):
    complete, broken = write(tmp_path, 10), write(tmp_path, 20)
    file = broken / ("rng_state.pth" if "random" in damage else "trainer_state.json")
    if damage.startswith("half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    assert last_checkpoint(tmp_path) == complete


def test_the_random_state_of_every_process_must_be_complete(tmp_path):
    """How many there were is not asked: the trainer's own state is written when all have written theirs."""
    complete, broken = (write(tmp_path, step, ranks=("_0", "_1")) for step in (10, 20))
    half = (broken / "rng_state_1.pth").read_bytes()[:50]
    (broken / "rng_state_1.pth").write_bytes(half)
    assert last_checkpoint(tmp_path) == complete
    assert processes_of(complete) == 2


BEST = ["evaluation.load_best_model_at_end=true", "evaluation.data=[{source: held_out.jsonl}]"]


@pytest.mark.parametrize(
    ("start", "change", "refused"),
    [
        ([], ["evaluation.eval_steps=7", "evaluation.batch_size=3", "evaluation.eval_on_start=true"], None),
        ([], BEST, "evaluation.data, evaluation.load_best_model_at_end"),
        (BEST, ["evaluation.data.0.limit=5"], "evaluation.data"),
        (BEST, ["evaluation.suite=builtin"], "evaluation.suite"),
        (BEST, ["evaluation.eval_steps=7"], "evaluation.eval_steps"),
        (BEST, ["evaluation.batch_size=3", "evaluation.eval_on_start=true", "training.logging_steps=3"], None),
        (["loss.teacher=t", "loss.name=distill"], ["evaluation.batch_size=3"], "evaluation.batch_size"),
    ],
)
def test_a_resumed_run_may_change_only_what_leaves_the_weights_as_they_are(
    make_recipe, tmp_path, start, change, refused
):
    make_recipe(None, *start).to_yaml(tmp_path / "recipe.yaml")
    write(tmp_path / "checkpoints", 10)
    changed = make_recipe(None, *start, *change)
    if refused is None:
        check_output(changed, tmp_path, resume=True)
        return
    with pytest.raises(ConfigurationError, match=rf": {refused} changed\. Restore"):
        check_output(changed, tmp_path, resume=True)
