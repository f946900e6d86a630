"""Whatever is planted in a folder, no command runs it without the flag, and a refusal is one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from st_llmpool.cli import app
from st_llmpool.modules.errors import StLlmpoolError
from st_llmpool.training import Recipe, train
from tests.evaluation.tiny_suite import write_suite

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EVIL = "evil.Evil"
ELSEWHERE = "user/repo--evil.Evil"


class Evil:
    """Touches the file when it is unpickled."""

    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def set_json(folder: Path, file: str, **values) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, **values}))


def add_module(folder: Path, reference: str, path: str = "", **more) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    number = len(modules)
    modules.append({"idx": number, "name": str(number), "path": path, "type": reference, **more})
    (folder / "modules.json").write_text(json.dumps(modules))


def append_evil(folder: Path, file: str) -> None:
    with (folder / file).open("a") as code:
        code.write((folder / "evil.py").read_text())


def link_over(folder: Path, file: str, target: str) -> None:
    (folder / file).unlink()
    (folder / file).symlink_to(folder / target)


def router(folder: Path, reference: str) -> None:
    add_module(folder, "sentence_transformers.base.modules.router.Router", "3_Router")
    config = {"types": {"q_0_Evil": reference}, "structure": {"q": ["q_0_Evil"]}, "parameters": {}}
    set_json(folder, "3_Router/router_config.json", **config)


def evil_base(folder: Path) -> None:
    base = folder.parent / "evil_base"
    base.mkdir()
    shutil.copy(folder / "evil.py", base)
    set_json(base, "config.json", model_type="evil", auto_map={"AutoConfig": EVIL, "AutoModel": EVIL})
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    adapter(folder, base_model_name_or_path=str(base))


def adapter(folder: Path, **values) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "", "r": 2, "target_modules": ["q_proj"]}
    set_json(folder, "adapter_config.json", **{**config, **values})


def bad_pickle(folder: Path, *names: str, instead: bool = False) -> None:
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Evil(str(folder.parent / "it_ran"))))
    if instead:
        (folder / "model.safetensors").unlink()


def card(folder: Path) -> None:
    front = f'license: !!python/object/apply:os.system ["touch {folder.parent / "it_ran"}"]'
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Model\n")
    (folder.parent / "recipe.yaml").write_text(front.replace("license", "model"))


def chat_template(folder: Path) -> None:
    command = f"touch {folder.parent / 'it_ran'}"
    (folder / "chat_template.jinja").write_text(f"{{{{ cycler.__init__.__globals__.os.system('{command}') }}}}")


def what_loading_ignores(folder: Path) -> None:
    """Everything that names code and stops no command, in one folder, since each case takes many loads."""
    set_json(folder, "text/config.json", auto_map=AUTO_MAP)
    set_json(folder, "generation_config.json", auto_map=AUTO_MAP, custom_generate=ELSEWHERE, trust_remote_code=True)
    for kind in ("video_preprocessor", "image_processor", "feature_extractor"):
        set_json(folder, f"{kind}_config.json", auto_map={"AutoImageProcessor": EVIL, "AutoVideoProcessor": EVIL})
    bad_pickle(
        folder, "pytorch_model.bin", "training_args.bin", "optimizer.pt", "1_MultiLayerPooling/pytorch_model.bin"
    )
    card(folder)
    chat_template(folder)


AUTO_MAP = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoModelForCausalLM"), EVIL)

#: What is planted. `evil.py` lies in every folder, and where Python looks for modules.
ATTACKS: dict[str, Callable[[Path], object]] = {
    "preprocessor_config names a processor of another repository": lambda folder: set_json(
        folder, "preprocessor_config.json", auto_map={"AutoProcessor": ELSEWHERE}, processor_class="Evil"
    ),
    "processor_config": lambda folder: set_json(
        folder, "processor_config.json", auto_map=AUTO_MAP, processor_class=EVIL
    ),
    "tokenizer_config": lambda folder: set_json(
        folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [EVIL, EVIL]}, tokenizer_class="Evil"
    ),
    "config": lambda folder: set_json(folder, "config.json", auto_map=AUTO_MAP),
    "config of an unknown type": lambda folder: set_json(folder, "config.json", auto_map=AUTO_MAP, model_type="evil"),
    "flag in the module's config": lambda folder: set_json(
        folder,
        "sentence_bert_config.json",
        trust_remote_code=True,
        **{f"{part}_kwargs": {"trust_remote_code": True} for part in ("model", "processor", "config")},
    ),
    "kernel in the module's config": lambda folder: set_json(
        folder,
        "sentence_bert_config.json",
        model_kwargs={"attn_implementation": "user/kernel", "allow_all_kernels": True, "use_kernels": True},
    ),
    "backbone's code has one line more": lambda folder: append_evil(folder, "llm_transformer.py"),
    "pooling's code has one line more": lambda folder: append_evil(folder, "multi_layer_pooling.py"),
    "a helper has one line more": lambda folder: append_evil(folder, "errors.py"),
    "code is a link": lambda folder: link_over(folder, "multi_layer_pooling.py", "evil.py"),
    "module of the folder": lambda folder: add_module(folder, EVIL),
    "module of another repository": lambda folder: add_module(folder, ELSEWHERE),
    "os.system as module": lambda folder: add_module(folder, "os.system", f"; touch {folder.parent / 'it_ran'}"),
    "subprocess.Popen as module": lambda folder: add_module(folder, "subprocess.Popen", kwargs=["shell"]),
    "torch.load as module": lambda folder: add_module(folder, "sentence_transformers.base.model.torch"),
    "library's own function as module": lambda folder: add_module(folder, "errors.difflib"),
    "router": lambda folder: router(folder, EVIL),
    "activation": lambda folder: [
        add_module(folder, "sentence_transformers.base.modules.dense.Dense", "3_Dense"),
        set_json(folder, "3_Dense/config.json", in_features=64, out_features=64, activation_function=EVIL),
    ],
    "tokenizer of word embeddings": lambda folder: [
        add_module(folder, "sentence_transformers.sentence_transformer.modules.WordEmbeddings", "3_Words"),
        set_json(folder, "3_Words/wordembedding_config.json", tokenizer_class=EVIL),
    ],
    "pooling's config names classes": lambda folder: set_json(
        folder, "1_MultiLayerPooling/config.json", auto_map=AUTO_MAP, type=EVIL, tokenizer_class=EVIL
    ),
    "adapter on an evil base": evil_base,
    "adapter that names libraries": lambda folder: adapter(
        folder,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        megatron_config={"evil": "evil"},
        megatron_core="evil",
        base_model_name_or_path=str(folder),
    ),
    "what loading ignores": what_loading_ignores,
    "pickle in place of the weights": lambda folder: bad_pickle(folder, "pytorch_model.bin", instead=True),
}


@pytest.fixture(scope="module")
def finished(tiny_llm, tmp_path_factory) -> Path:
    """A run that has ended; its model is our own."""
    root = tmp_path_factory.mktemp("finished")
    pairs = [{"query": f"q {row} fox", "positive": f"p {row} dog"} for row in range(8)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    values = {
        "output_dir": str(root / "run"),
        "model": {"base": tiny_llm, "max_seq_length": 16, "tune": "pooling"},
        "data": [{"source": str(root / "pairs.jsonl")}],
        "training": {"max_steps": 1, "batch_size": 4, "warmup_steps": 0},
    }
    train(Recipe.from_dict(values))
    shutil.rmtree(root / "run" / "checkpoints")
    return root


@pytest.fixture(params=ATTACKS)
def planted(request, finished, tmp_path, monkeypatch) -> Path:
    """A finished run, attacked; the model is in `model`, and `it_ran` appears if anything planted ran."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    recipe = Recipe.from_yaml(run / "recipe.yaml", [f"output_dir={run}"])
    recipe.to_yaml(run / "recipe.yaml")
    code = f"\nimport pathlib\npathlib.Path({str(run / 'it_ran')!r}).touch()\nclass Evil: pass\n"
    (run / "model" / "evil.py").write_text(code)
    importable = tmp_path / "importable"
    importable.mkdir()
    (importable / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(importable)
    ATTACKS[request.param](run / "model")
    return run


@pytest.mark.logs_warning
def test_nothing_planted_runs_in_any_command_without_the_flag(planted, finished, tiny_llm, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("st_llmpool.hub.submission._mock_run", lambda encoder, meta: "")
    model, suite = planted / "model", write_suite(tmp_path / "data", [{"name": "T", "type": "STS", "folder": "sts"}])
    other = finished / "run" / "model"
    recipe = str(planted / "recipe.yaml")
    out = [str(tmp_path / f"out{number}") for number in range(9)]
    commands = [
        ["doctor", model],
        ["export", model, "--out", out[0]],
        ["export", model, "--out", out[1], "--merge"],
        ["evaluate", model, "--suite", suite, "--data", tmp_path / "data", "--out", out[2]],
        ["layers", model],
        ["card", model],
        ["soup", model, other, "--out", out[3]],
        ["soup", other, model, "--out", out[4]],
        ["submission", model, "--name", "alice/x", "--revision", COMMIT, "--license", "mit", "--out", out[5]],
        ["select", tmp_path / "pool.jsonl", "--target", tmp_path / "pool.jsonl", "--k", "1", "--model", model],
        ["push", model, "alice/one"],
        ["push", model, "alice/two", "--no-check"],
        ["train", recipe, "--resume"],
    ]
    (tmp_path / "pool.jsonl").write_text('{"text": "a fox"}\n{"text": "a dog"}\n')
    monkeypatch.chdir(tmp_path)
    for command in commands:
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert not (planted / "it_ran").exists(), command
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            assert isinstance(result.exception, StLlmpoolError), (command, result.exception)
            assert len(str(result.exception).splitlines()) == 1 or command[0] in ("push", "export"), result.exception
