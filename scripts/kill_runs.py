"""Kill training runs at random moments, resume them, and compare with runs that were never stopped, bit by bit.

    python scripts/kill_runs.py --kinds full lora staged mntp --kills 5

Offline, on a tiny random language model. Each killed run is resumed until it ends; its losses and every file of its
model must equal those of the unbroken run. Two more cases: two runs that start in one folder at once, and a
run of two processes that is killed and resumed on one. Prints a line for each case; exit status 1 if any fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from st_llmpool.training import AdaptRecipe, Recipe, adapt, train

_COUNTER = itertools.count()
WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "cats", "sleep", "near", "tall", "green", "trees"]


def write_inputs(folder: Path) -> None:
    """Writes a language model, pairs and texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    rng = random.Random(0)

    def text(mark: str) -> str:
        return " ".join([mark, *rng.choices(WORDS, k=6)])

    rows = [{name: text(f"{name[0]}{row}") for name in ("query", "positive", "negative")} for row in range(64)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "texts.txt").write_text("\n".join(text(str(row)) for row in range(64)), encoding="utf-8")


def recipe_of(kind: str, inputs: Path, folder: Path, steps: int) -> dict:
    """Returns a recipe with a checkpoint at every second step."""
    training = {"max_steps": steps, "batch_size": 4, "save_steps": 2, "learning_rate": 1e-3, "logging_steps": 1}
    lora = {"r": 4, "lora_dropout": 0.2}
    texts = [{"source": str(inputs / "texts.txt")}]
    if kind == "mntp":
        values = {"base": str(inputs / "base"), "texts": texts, "lora": lora, "max_seq_length": 24}
        return {"output_dir": str(folder), "training": training, **values}
    stages = [{"kind": "mntp", "texts": texts}, {"kind": "simcse", "texts": texts}] if kind == "staged" else []
    return {
        "output_dir": str(folder),
        "model": {
            "base": str(inputs / "base"),
            "max_seq_length": 24,
            **({"tune": "full"} if kind == "full" else {"tune": "lora", "lora": lora}),
        },
        "data": [{"source": str(inputs / "pairs.jsonl")}],
        "training": training,
        "stages": [{**stage, "training": {**training, "max_steps": max(steps // 2, 2)}} for stage in stages],
    }


@dataclass
class Run:
    """A training in processes of its own.

    Args:
        pids: Its processes, which lead groups of their own.
        log: What they print.
    """

    pids: list[int]
    log: Path

    def kill(self) -> None:
        """Ends all at once."""
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = float("inf")) -> int | None:
        """Waits for all to end, at most `seconds`; returns 0 if all ended well, None if one still runs."""
        deadline = time.monotonic() + seconds
        while not hasattr(self, "status") and time.monotonic() < deadline:
            ended = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self.pids]
            if all(ended):
                self.status = max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in self.pids)
            time.sleep(0.01)
        return getattr(self, "status", None)

    def finish(self) -> None:
        """Waits for a training that has to end well."""
        if self.wait() != 0:
            raise AssertionError(self.log.read_text(encoding="utf-8")[-3000:])


def start(kind: str, recipe: dict, *, resume: bool, processes: int = 1) -> Run:
    """Starts a training in forks of this process, which has imported all that takes seconds."""
    folder = Path(recipe["output_dir"])
    log = folder.with_name(f"{folder.name}-{next(_COUNTER)}.log")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            if processes > 1:
                group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
            train_and_exit(kind, recipe, log, resume=resume)
        pids.append(pid)
    return Run(pids, log)


def train_and_exit(kind: str, recipe: dict, log: Path, *, resume: bool) -> NoReturn:
    """Trains, in a fork."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        if kind == "mntp":
            adapt(AdaptRecipe.from_dict(recipe), resume=resume)
        else:
            train(Recipe.from_dict(recipe), resume=resume)
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def checkpoints_of(folder: Path) -> int:
    """Returns how many checkpoints a run has, its stages counted in."""
    return sum(len(list(place.glob("checkpoint-*"))) for place in folder.rglob("checkpoints"))


def same(one: Path, other: Path) -> bool:
    """Returns whether two runs have the same losses and the same bytes in every file that a model is made of."""
    reports = [json.loads((folder / "training.json").read_text(encoding="utf-8")) for folder in (one, other)]
    if reports[0]["losses"] != reports[1]["losses"]:
        return False
    files = [file.relative_to(one) for file in (one / "model").rglob("*") if file.suffix in (".json", ".safetensors")]
    # The seal holds hashes of files that may name the run's folder; these are compared themselves.
    files = [file for file in files if file.name != "st_llmpool.json"]
    return all(without_places(one / file, one) == without_places(other / file, other) for file in files)


def without_places(file: Path, folder: Path) -> bytes:
    """Returns the bytes of a file; the folder that a run lay in is no difference."""
    return file.read_bytes().replace(str(folder).encode(), b"")


def killed_and_resumed(kind: str, inputs: Path, work: Path, kills: int, steps: int, rng: random.Random) -> list[bool]:
    """Returns, for each kill, whether the run that was resumed equals the unbroken one."""
    unbroken = work / f"{kind}-unbroken"
    began = time.monotonic()
    start(kind, recipe_of(kind, inputs, unbroken, steps), resume=False).finish()
    seconds = time.monotonic() - began
    seen = []
    for number in range(kills):
        folder = work / f"{kind}-{number}"
        recipe = recipe_of(kind, inputs, folder, steps)
        run = start(kind, recipe, resume=False)
        if run.wait(rng.uniform(0.05, 1.0) * seconds) is None:
            run.kill()
        at = checkpoints_of(folder)
        start(kind, recipe, resume=True).finish()
        left = [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".lock"))]
        seen.append(same(unbroken, folder) and not left)
        say(seen[-1], f"{kind}: killed with {at} checkpoints, resumed" + (f", left {left}" if left else ""))
    return seen


def two_at_once(inputs: Path, work: Path, steps: int) -> list[bool]:
    """Starts two runs in one folder: one is refused by name, the other ends as if alone."""
    recipe = recipe_of("lora", inputs, work / "two", steps)
    alone = recipe_of("lora", inputs, work / "alone", steps)
    both = [start("lora", recipe, resume=resume) for resume in (False, True)]
    refused = [run.log.read_text(encoding="utf-8") for run in both if run.wait() != 0]
    start("lora", alone, resume=False).finish()
    good = len(refused) == 1 and "is in use by process" in refused[0] and same(work / "alone", work / "two")
    say(good, f"two runs in one folder at once: {len(refused)} refused, the other as if alone")
    return [good]


def two_processes_then_one(inputs: Path, work: Path, steps: int) -> list[bool]:
    """Kills a run of two processes after its first checkpoint and goes on with one; dropout is off."""
    recipe = recipe_of("full", inputs, work / "two-one", steps)
    run = start("full", recipe, resume=False, processes=2)
    while run.wait(0.05) is None and not (work / "two-one/checkpoints/checkpoint-2/trainer_state.json").exists():
        pass
    run.wait(0.2)
    run.kill()
    start("full", recipe, resume=True).finish()
    start("full", recipe_of("full", inputs, work / "one-one", steps), resume=False).finish()
    names = ("two-one", "one-one")
    losses = [json.loads((work / name / "training.json").read_text(encoding="utf-8"))["losses"] for name in names]
    gap = max(abs(one[1] - other[1]) for one, other in zip(*losses, strict=True))
    say(gap < 1e-4, f"two processes, killed, then one: losses differ by {gap:.1e} from those of one process")
    return [gap < 1e-4]


def say(good: bool, what: str) -> None:
    """Prints a line for a case."""
    print("ok   " if good else "FAIL ", what, flush=True)


def main() -> None:
    """Runs the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["full", "lora", "staged", "mntp", "two", "two-one"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        inputs, work = Path(folder, "inputs"), Path(folder, "runs")
        inputs.mkdir()
        work.mkdir()
        write_inputs(inputs)
        others: dict[str, Callable[[], list[bool]]] = {
            "two": lambda: two_at_once(inputs, work, given.steps),
            "two-one": lambda: two_processes_then_one(inputs, work, given.steps),
        }
        seen: list[bool] = []
        for kind in given.kinds:
            if kind in others:
                seen += others[kind]()
            else:
                seen += killed_and_resumed(kind, inputs, work, given.kills, given.steps, rng)
    print(f"{sum(seen)} of {len(seen)}")
    sys.exit(not all(seen))


if __name__ == "__main__":
    main()
