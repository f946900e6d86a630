"""Two processes against one: the same losses and weights, whatever the number of processes that share a batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import load_file

from st_llmpool.training import Recipe, train
from st_llmpool.utils.files import locked_folder

HARD = ["loss.focal_gamma=0.5", "loss.mixing.hardest=3", "loss.mixing.detach=false"]
SPARSE = ["training.sparse_tuning={layers: 1, interval: 1, importance_rate: 1000}"]
CACHED = ["loss.mini_batch_size=1"]
#: Name of a run on two processes -> what it changes, and what one process changes that it must equal.
RUNS = {
    "plain": ([], []),
    "cached": (CACHED, []),
    "hard": (HARD, HARD),
    "hard-cached": (HARD + CACHED, HARD),
    "sparse": (SPARSE, SPARSE),
}
# All runs in one launch, since importing takes longer than training.
SCRIPT = """
import json, sys
from st_llmpool.training import Recipe, train
for overrides in json.loads(sys.argv[2]):
    train(Recipe.from_yaml(sys.argv[1], overrides))
"""


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script on two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", *map(str, arguments)]
    package = str(Path(train.__code__.co_filename).parents[2])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)


def test_two_processes_give_the_losses_and_weights_of_one_with_the_whole_batch(make_recipe, tmp_path, write_pairs):
    sets = [
        {"source": write_pairs(tmp_path / "a.jsonl", rows=8, seed=1), "instruction": "Find:"},
        {"source": write_pairs(tmp_path / "b.jsonl", rows=8, seed=2)},
    ]
    model = {"lora": {"r": 4, "lora_dropout": 0.0}}
    recipe = make_recipe({"data": sets, "model": model, "training": {"max_steps": 3, "learning_rate": 1e-3}})
    alone = {
        name: train(Recipe.from_dict(recipe.to_dict(), [f"output_dir={tmp_path / name}-alone", *RUNS[name][1]]))
        for name in ("plain", "hard", "sparse")
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    (tmp_path / "script.py").write_text(SCRIPT)

    runs = json.dumps([[f"output_dir={tmp_path / name}", *changes] for name, (changes, _) in RUNS.items()])
    done = launch(tmp_path / "script.py", tmp_path / "recipe.yaml", runs)
    assert done.returncode == 0, done.stderr[-3000:]

    for name in RUNS:
        single = next(alone[other] for other in alone if RUNS[other][1] == RUNS[name][1])
        report = json.loads((tmp_path / name / "training.json").read_text())
        assert report["processes"] == 2
        np.testing.assert_allclose(report["losses"], single.report["losses"], atol=1e-5)
        np.testing.assert_allclose(report["pooling_share"], single.report["pooling_share"], atol=1e-5)
        for file in ("adapter_model.safetensors", "1_MultiLayerPooling/model.safetensors"):
            expected, found = load_file(single.model_dir / file), load_file(tmp_path / name / "model" / file)
            for weight, tensor in expected.items():
                np.testing.assert_allclose(found[weight], tensor, atol=1e-5, err_msg=f"{name}: {weight}")
    assert not np.allclose(alone["plain"].report["losses"], alone["hard"].report["losses"], atol=1e-2)


# The loss, or its gradients, are spoilt on the second process alone, in the third step.
SPOILT = """
import errno, json, os, sys
from pathlib import Path
from sentence_transformers import SentenceTransformer
from st_llmpool.training import AdaptRecipe, Recipe, adapt, train
from st_llmpool.training.trainer import TrainingError
from st_llmpool.training.mntp.masked_next_token import MaskedTokenTrainer
from st_llmpool.training.trainer import EmbedderTrainer

def spoil(kind, what):
    compute_loss = kind.compute_loss
    def spoilt(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        if self.args.process_index == 1 and self.state.global_step == 2:
            if what == "gradients":
                loss.register_hook(lambda gradient: gradient * float("nan"))
            else:
                loss = loss * float(what)
        return loss
    kind.compute_loss = spoilt
    return compute_loss

for name, (values, what) in json.loads(Path(sys.argv[1]).read_text()).items():
    kind = MaskedTokenTrainer if "base" in values else EmbedderTrainer
    sound = spoil(kind, what)
    try:
        adapt(AdaptRecipe.from_dict(values)) if "base" in values else train(Recipe.from_dict(values))
    except TrainingError as error:
        Path(values["output_dir"]).with_name(f"{name}-{os.environ['RANK']}.txt").write_text(str(error))
    kind.compute_loss = sound
save = SentenceTransformer.save
def full(self, path, *args, **kwargs):
    if "checkpoint-2" in str(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save(self, path, *args, **kwargs)

if os.environ["RANK"] == "0":
    SentenceTransformer.save = full
train(Recipe.from_dict({**values, "output_dir": values["output_dir"] + "-again"}))  # the other waits, and is ended
"""


def test_what_is_not_finite_on_one_process_stops_both_before_anything_is_saved(
    make_recipe, tiny_lm, words_file, tmp_path, write_pairs
):
    pairs = write_pairs(tmp_path / "pairs.jsonl", rows=16)
    training = {"max_steps": 5, "save_steps": 1, "learning_rate": 1e-3}
    values = make_recipe({"data": [{"source": pairs}], "training": training}).to_dict()
    stage = {"kind": "simcse", "texts": [{"source": pairs, "column": "query"}]}
    texts = {"base": tiny_lm, "texts": [{"source": words_file}], "max_seq_length": 24, "training": values["training"]}
    runs = {
        "mntp": (texts, "nan"),
        "simcse": ({**values, "stages": [stage]}, "inf"),
        "plain": (values, "gradients"),
    }
    runs = {name: ({**recipe, "output_dir": str(tmp_path / name)}, what) for name, (recipe, what) in runs.items()}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    (tmp_path / "script.py").write_text(SPOILT)
    done = launch(tmp_path / "script.py", tmp_path / "runs.json")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "checkpoint-2 cannot be written" in done.stderr, done.stderr[-6000:]
    assert (tmp_path / "plain-0.txt").read_text().startswith("Step 3: the gradients are not finite")

    for name in runs:
        messages = [(tmp_path / f"{name}-{rank}.txt").read_text() for rank in range(2)]
        assert messages[0].startswith("Step 3: the "), messages[0]
        assert messages[0] == messages[1]
        folder = tmp_path / name / ("stages/1-simcse" if name == "simcse" else "")
        checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert checkpoints == ["checkpoint-1", "checkpoint-2"], name
        assert not (folder / "model").exists()
        assert not (tmp_path / name / ".lock").exists()


# Both processes must raise: one that did not would meet the other one's next run in its collective calls.
TAKEN = """
import os, sys
from pathlib import Path
from st_llmpool.training import Recipe, train
from st_llmpool.modules.errors import ConfigurationError
for name in ("taken", "free"):
    try:
        train(Recipe.from_yaml(sys.argv[1], [f"output_dir={Path(sys.argv[1]).parent / name}"]))
    except ConfigurationError as error:
        Path(sys.argv[1]).with_name(f"{name}-{os.environ['RANK']}.txt").write_text(str(error))
"""


def test_a_folder_in_use_is_refused_on_both_processes_and_their_next_run_is_sound(make_recipe, tmp_path):
    make_recipe({"training": {"max_steps": 1}}).to_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "script.py").write_text(TAKEN)
    with locked_folder(tmp_path / "taken"):
        done = launch(tmp_path / "script.py", tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [(tmp_path / f"taken-{rank}.txt").read_text() for rank in range(2)]
    assert "is in use by process" in messages[0]
    assert messages[0] == messages[1]
    assert json.loads((tmp_path / "free" / "training.json").read_text())["processes"] == 2
