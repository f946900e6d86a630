"""A saved model brings the code it needs, and works where st_llmpool is not installed."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.normalize import Normalize
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_relative_import_files

from st_llmpool import POOLINGS, build_embedder, optimize_inference
from st_llmpool.modules import portable
from st_llmpool.modules.llm_transformer import LLMTransformer
from st_llmpool.modules.multi_layer_pooling import MultiLayerPooling
from st_llmpool.modules.portable import PortableModule
from st_llmpool.modules.scalar_mix_pooling import ScalarMixPooling
from tests.conftest import unseal

PACKAGE = Path(portable.__file__).parents[1]
SOURCES = (PACKAGE / "modules", PACKAGE / "poolings")
TEXTS = ["the quick brown fox", "", "jumps over the lazy dog " * 30]
OURS = [name for name, spec in POOLINGS.items() if hasattr(spec.module, "is_st_llmpool_module")]


class ScalePooling(PortableModule):
    """The smallest pooling with a weight and a setting."""

    config_keys: ClassVar[list[str]] = ["factor"]

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features | {"sentence_embedding": features["readout"] * self.weight * self.factor}


def imported_files(name: str) -> set[str]:
    """Files of the package that `name` needs, by reading their syntax trees."""
    found, open_files = set(), [name]
    while open_files:
        file = open_files.pop()
        if file not in found:
            found.add(file)
            tree = ast.parse(source(file).read_text())
            froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
            open_files += [f"{node.module.rpartition('.')[2]}.py" for node in froms]
    return found


def source(name: str) -> Path:
    return next(folder / name for folder in SOURCES if (folder / name).is_file())


def build(base: str) -> SentenceTransformer:
    backbone = LLMTransformer(base, attention="bidirectional", layers=[1, -1], layer_readout="eos", max_seq_length=40)
    pooling = ScalarMixPooling(embedding_dimension=32, num_layers=2)
    with torch.no_grad():
        pooling.layer_scores.copy_(torch.tensor([0.3, -0.7]))
    prompts = {"query": "query: "}
    return SentenceTransformer(modules=[backbone, pooling, Normalize()], device="cpu", prompts=prompts)


@pytest.fixture(scope="module")
def saved(tiny_llm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A saved model and its vectors. Read only."""
    folder = tmp_path_factory.mktemp("portable") / "model"
    model = build(tiny_llm)
    model.save_pretrained(str(folder), safe_serialization=False)
    return folder, model.encode(TEXTS, convert_to_tensor=True)


# --- what a save writes ---------------------------------------------------------------------------------------------


def test_the_root_holds_the_needed_files_and_no_other_code(saved):
    expected = imported_files("llm_transformer.py") | imported_files("scalar_mix_pooling.py")
    assert {file.name for file in saved[0].rglob("*.py")} == expected
    assert {file.name for file in saved[0].glob("*.py")} == expected


def test_copied_code_is_the_packages_code_under_one_header_line(saved):
    for file in saved[0].glob("*.py"):
        header, _, code = file.read_text().partition("\n")
        assert header == portable.CODE_HEADER.strip()
        assert code == source(file.name).read_text()


def test_code_from_two_folders_is_found_and_its_imports_are_flat(tmp_path):
    files = {
        "poolings/mine.py": "import os\nfrom ..modules.base import A\nfrom .near import B, C\nfrom os import path\n",
        "poolings/near.py": "def f():\n    from ..modules.base import A\n    from .mine import D\n",
        "poolings/unused.py": "",
        "modules/base.py": "from __future__ import annotations\nfrom .deep import (\n    E,\n)\n",
        "modules/deep.py": "text = 'taken from ..modules.base import'  # no import\n",
    }
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    found = portable.code_files(tmp_path / "poolings/mine.py")
    assert [str(file.relative_to(tmp_path)) for file in found] == [
        "poolings/mine.py",
        *("modules/base.py", "poolings/near.py", "modules/deep.py"),
    ]
    assert [portable.saved_code(file) for file in found] == [
        "import os\nfrom .base import A\nfrom .near import B, C\nfrom os import path\n",
        files["modules/base.py"],
        "def f():\n    from .base import A\n    from .mine import D\n",
        files["modules/deep.py"],
    ]


@pytest.mark.parametrize("name", OURS)
def test_transformers_finds_in_a_saved_model_the_files_that_were_saved(name, tmp_path):
    module_class = POOLINGS[name].module
    portable.save_source_files(module_class, tmp_path)
    file = tmp_path / f"{module_class.__module__.rpartition('.')[2]}.py"
    needed = {Path(other).name for other in get_relative_import_files(file)} | {file.name}
    assert {other.name for other in tmp_path.glob("*.py")} == needed == imported_files(file.name)


def test_modules_are_named_as_file_dot_class(saved):
    types = [module["type"] for module in json.loads((saved[0] / "modules.json").read_text())]
    assert types[:2] == ["llm_transformer.LLMTransformer", "scalar_mix_pooling.ScalarMixPooling"]
    assert types[2].startswith("sentence_transformers.")


def test_weights_are_safetensors_whatever_the_caller_asks(saved):
    kinds = {file.suffix for file in saved[0].rglob("*") if file.is_file()}
    assert ".safetensors" in kinds
    assert not kinds & {".bin", ".pt", ".pth", ".pkl"}


def test_nothing_unfinished_is_left(saved):
    assert not list(saved[0].rglob("*.partial"))


@pytest.mark.parametrize("first", [True, False], ids=["new folder", "over an earlier save"])
def test_a_save_that_was_cut_off_does_not_load(tiny_llm, tmp_path, monkeypatch, first):
    model = build(tiny_llm)
    if not first:
        model.save_pretrained(str(tmp_path))

    def cut_off(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScalarMixPooling, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(str(tmp_path))
    with pytest.raises(ImportError, match="saved_only_in_part"):
        SentenceTransformer(str(tmp_path))
    monkeypatch.undo()
    model.save_pretrained(str(tmp_path))
    SentenceTransformer(str(tmp_path), trust_remote_code=True)


@pytest.mark.logs_warning
def test_a_save_over_another_design_leaves_none_of_its_code(tiny_llm, tmp_path):
    (tmp_path / "mine.py").write_text("")
    build(tiny_llm).save_pretrained(str(tmp_path))
    assert (tmp_path / "scalar_mix_pooling.py").is_file()
    SentenceTransformer(modules=[LLMTransformer(tiny_llm), Normalize()]).save_pretrained(str(tmp_path))
    assert not (tmp_path / "scalar_mix_pooling.py").exists()
    assert (tmp_path / "mine.py").is_file()


def remove_first(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def misshape_first(tensors: dict[str, Tensor]) -> None:
    tensors[min(tensors)] = torch.zeros(3)


@pytest.mark.parametrize("damage", [remove_first, misshape_first])
@pytest.mark.parametrize("folder", ["", "1_ScalarMixPooling"])
def test_weights_that_are_missing_or_misshapen_are_named_and_never_random(saved, tmp_path, folder, damage):
    model = shutil.copytree(saved[0], tmp_path / "model")
    unseal(model)  # a seal would refuse the file before it is read
    file = model / folder / "model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name) as caught:
        SentenceTransformer(str(model), trust_remote_code=True)
    assert type(caught.value).__name__ == "DataError"


@pytest.mark.parametrize("file", ["model.safetensors", "1_ScalarMixPooling/model.safetensors"])
@pytest.mark.parametrize("size", [0, 100, -100], ids=["empty", "start only", "end missing"])
def test_a_truncated_weight_file_without_a_seal_is_named(saved, tmp_path, file, size):
    model = shutil.copytree(saved[0], tmp_path / "model")
    unseal(model)
    (model / file).write_bytes((model / file).read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{model}.*cannot be used"):
        SentenceTransformer(str(model), trust_remote_code=True)


@pytest.mark.parametrize("file", ["sentence_bert_config.json", "1_ScalarMixPooling/config.json"])
def test_a_config_of_a_newer_version_is_named(saved, tmp_path, file):
    model = shutil.copytree(saved[0], tmp_path / "model")
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | {"of_tomorrow": 1}))
    with pytest.raises(ValueError, match=f"{file}.*newer st_llmpool"):
        SentenceTransformer(str(model), trust_remote_code=True)


@pytest.mark.logs_warning
def test_the_oldest_usable_versions_are_written_and_checked_before_any_code_runs(
    saved, tiny_llm, tmp_path, monkeypatch
):
    file = "config_sentence_transformers.json"
    requirements = json.loads((saved[0] / file).read_text())["requirements"]
    assert {name: entry["specifier"] for name, entry in requirements.items()} == {
        name: specifier for name, (specifier, _) in portable.MINIMUM_VERSIONS.items()
    }
    monkeypatch.setattr(portable, "MINIMUM_VERSIONS", {"transformers": (">=99", "for the test")})
    SentenceTransformer(modules=[LLMTransformer(tiny_llm), Normalize()]).save_pretrained(str(tmp_path))
    with pytest.raises(ImportError, match=r"transformers.*99"):
        SentenceTransformer(str(tmp_path), trust_remote_code=True)


def test_a_module_saved_by_itself_needs_no_model_config(tiny_llm, tmp_path):
    LLMTransformer(tiny_llm).save(str(tmp_path))
    assert not (tmp_path / "config_sentence_transformers.json").exists()


def test_a_pooling_is_read_back_as_it_was_saved(tmp_path):
    module = ScalePooling(factor=3.0)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    (tmp_path / "1_ScalePooling").mkdir()
    module.save(str(tmp_path / "1_ScalePooling"), safe_serialization=False)
    reloaded = ScalePooling.load(str(tmp_path), subfolder="1_ScalePooling", trust_remote_code=True, backend="torch")
    assert reloaded.factor == 3.0
    torch.testing.assert_close(reloaded.weight, module.weight)
    assert sorted(file.name for file in (tmp_path / "1_ScalePooling").iterdir()) == ["config.json", "model.safetensors"]


# --- the true module in memory, the flat name in a saved model ------------------------------------------------------


@pytest.mark.parametrize("module_class", [LLMTransformer, ScalarMixPooling, ScalePooling])
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps, cloudpickle.dumps], ids=["C", "Python", "cloudpickle"])
def test_a_class_is_found_by_its_module_in_this_process(module_class, dumps):
    module = sys.modules[module_class.__module__]
    assert getattr(module, module_class.__name__) is module_class
    assert inspect.getmodule(module_class) is module
    assert f"class {module_class.__name__}(" in inspect.getsource(module_class)
    assert typing.get_type_hints(module_class)["config_keys"]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(dumps(module_class, protocol=protocol)) is module_class
    assert type(copy.deepcopy(module_class.__module__)) is str
    assert repr(module_class) == f"<class '{module.__name__}.{module_class.__name__}'>"


def test_sentence_transformers_still_asks_what_the_flat_name_answers():
    """The canary of `SavedModuleName`: modules.json by an f-string, code copied by a prefix."""
    code = inspect.getsource(SentenceTransformer.save)
    assert "class_ref = type(module).__module__" in code
    assert 'class_ref.startswith("transformers_modules.")' in code
    assert 'class_ref = f"{class_ref}.{type(module).__name__}"' in code


# --- how much code a saved model carries ----------------------------------------------------------------------------


def code_of(name: str) -> list[Path]:
    classes = (LLMTransformer, POOLINGS[name].module)
    return sorted({file for found in classes for file in portable.code_files(Path(inspect.getfile(found)))})


def lines_of(name: str) -> int:
    return sum(len(file.read_text().splitlines()) for file in code_of(name))


def test_a_saved_design_5_carries_at_most_ten_files():
    names = {file.name for file in code_of("multi_layer")}
    assert len(names) <= 10, names
    assert {"attention_proof.py", "packing.py"}.isdisjoint(names)
    assert len(code_of("scalar_mix")) < len(names)


def test_a_saved_design_5_carries_at_most_1700_lines():
    """Each saved file has one more, its header."""
    assert lines_of("scalar_mix") < lines_of("multi_layer") <= 1700 - len(code_of("multi_layer"))


def test_the_card_counts_the_code(tiny_llm, tmp_path):
    build_embedder(tiny_llm, pooling="multi_layer", verify=False, device="cpu").save_pretrained(str(tmp_path))
    files = list(tmp_path.glob("*.py"))
    assert len(files) == len(code_of("multi_layer"))
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert f"the {len(files)} Python files of this repository ({lines_of('multi_layer'):,} lines)" in card


# --- copies in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_module_can_be_copied(copied):
    module = ScalePooling(factor=3.0)
    twin = copied(module)
    assert type(twin) is ScalePooling
    assert twin.factor == 3.0
    assert twin.weight is not module.weight
    torch.testing.assert_close(twin.weight, module.weight)


def test_modules_are_recognised_without_isinstance(tiny_llm):
    assert LLMTransformer(tiny_llm).is_st_llmpool_module
    assert ScalePooling().is_st_llmpool_module


# --- a user's own class ---------------------------------------------------------------------------------------------

USER_CODE = """\
from st_llmpool.modules.scalar_mix_pooling import ScalarMixPooling


class NegatedPooling(ScalarMixPooling):
    def pool(self, features):
        return -super().pool(features)
"""


@pytest.fixture(scope="module")
def saved_by_user(saved: tuple[Path, Tensor], tiny_llm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "negated_pooling.py").write_text(USER_CODE)
    sys.path.insert(0, str(folder))
    try:
        from negated_pooling import NegatedPooling
    finally:
        sys.path.remove(str(folder))
    model = build(tiny_llm)
    pooling = NegatedPooling(embedding_dimension=32, num_layers=2)
    pooling.load_state_dict(model[1].state_dict())
    model[1] = pooling
    model.save_pretrained(str(folder / "model"))
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), -saved[1])
    return folder / "model"


def test_a_users_subclass_is_saved_with_its_file_and_without_our_licence(saved_by_user):
    assert (saved_by_user / "negated_pooling.py").read_text() == USER_CODE
    modules = json.loads((saved_by_user / "modules.json").read_text())
    assert modules[1]["type"] == "negated_pooling.NegatedPooling"


def test_a_class_of_a_script_or_notebook_is_saved_without_code_and_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ScalePooling, "__module__", "__main__")
    (tmp_path / "1_ScalePooling").mkdir()
    with caplog.at_level(logging.WARNING):
        ScalePooling().save(str(tmp_path / "1_ScalePooling"))
    assert not list(tmp_path.glob("*.py"))
    assert "ScalePooling" in caplog.text
    assert "Move it into a file" in caplog.text


# --- where st_llmpool is not installed ------------------------------------------------------------------------------

ELSEWHERE = """
import copy, importlib.util, json, pathlib, pickle, shutil, sys

sys.modules["st_llmpool"] = None  # as if it were not installed
arguments = json.loads(sys.argv[1])
import torch
from sentence_transformers import SentenceTransformer

work, texts, results = pathlib.Path(arguments["work"]), arguments["texts"], {}

def load(folder):
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")

def record(name, model):
    results[name] = model.encode(texts).tolist()

model = load(arguments["saved"])
record("loaded", model)
results["classes"] = [type(module).__module__ for module in model]
results["recognised"] = [getattr(module, "is_st_llmpool_module", False) for module in model]
record("deepcopy", copy.deepcopy(model))
record("pickle", pickle.loads(pickle.dumps(model)))
try:
    import st_llmpool
except ImportError:
    results["installed"] = False

model.save_pretrained(str(work / "again"))
results["again_files"] = sorted(file.name for file in (work / "again").glob("*"))
results["again_config"] = json.loads((work / "again/config_sentence_transformers.json").read_text())
again = load(work / "again")
record("again", again)
again.save_pretrained(str(work / "third"))
record("third", load(work / "third"))

trained = copy.deepcopy(model).train()
optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
trained(trained.preprocess(texts))["sentence_embedding"][:, 0].sum().backward()
optimizer.step()
trained.eval()
record("trained", trained)
trained.save_pretrained(str(work / "trained"))
record("trained_reloaded", load(work / "trained"))

# Two repositories with the same folder name and different code.
other = work / "other" / "model"
shutil.copytree(arguments["saved"], other)
with open(other / "scalar_mix_pooling.py", "a") as file:
    file.write(
        "\\n_pool = ScalarMixPooling.pool\\nScalarMixPooling.pool = lambda self, features: -_pool(self, features)\\n"
    )
negated = load(other)
record("other", negated)
record("first_beside_other", model)
model.save_pretrained(str(work / "first_saved"))
negated.save_pretrained(str(work / "other_saved"))
record("first_reloaded", load(work / "first_saved"))
record("other_reloaded", load(work / "other_saved"))

adapter = load(arguments["adapter"])
record("adapter", adapter)
results["adapter_attention"] = adapter[0].attention

def code_in(folder):
    return {file.name: file.read_text() for file in folder.glob("*.py")}

for folder in sorted((work / "poolings").iterdir()):
    pooling = load(folder)
    record(f"pooling {folder.name}", pooling)
    pooling.save_pretrained(str(work / "saved again" / folder.name))
    results[f"code kept {folder.name}"] = code_in(work / "saved again" / folder.name) == code_in(folder)

del sys.modules["st_llmpool"]
sys.path.insert(0, arguments["source"])
record("user", load(arguments["user"]))
pathlib.Path(arguments["output"]).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def elsewhere(saved, saved_by_user, tiny_llm, tmp_path_factory) -> dict[str, Any]:
    """Everything that one fresh process without the package did with the saved models."""
    work = tmp_path_factory.mktemp("elsewhere")
    adapted = build(tiny_llm)
    adapted.add_adapter(LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(work / "adapter"))
    with_poolings = {}
    for name in OURS:
        model = build_embedder(tiny_llm, pooling=name, device="cpu", verify=False)
        with torch.no_grad():
            for parameter in model[1].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(str(work / "poolings" / name))
        with_poolings[name] = model.encode(TEXTS).tolist()
    arguments = {
        "saved": str(saved[0]),
        "user": str(saved_by_user),
        "adapter": str(work / "adapter"),
        "source": str(PACKAGE.parent),
        "work": str(work),
        "texts": TEXTS,
        "output": str(work / "results.json"),
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(ELSEWHERE), json.dumps(arguments)]
    process = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    results = json.loads((work / "results.json").read_text())
    return results | with_poolings | {"adapted": adapted.encode(TEXTS).tolist(), "expected": saved[1].tolist()}


def assert_same(elsewhere: dict[str, Any], name: str, expected: str, sign: int = 1) -> None:
    torch.testing.assert_close(
        torch.tensor(elsewhere[name]), sign * torch.tensor(elsewhere[expected]), rtol=1e-5, atol=1e-6
    )


def test_a_saved_model_works_without_the_package(elsewhere):
    assert elsewhere["installed"] is False
    assert_same(elsewhere, "loaded", "expected")
    assert elsewhere["recognised"] == [True, True, False]


@pytest.mark.parametrize("name", OURS)
def test_every_pooling_works_without_the_package(elsewhere, name):
    assert_same(elsewhere, f"pooling {name}", name)
    assert elsewhere[f"code kept {name}"]


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_a_dynamically_loaded_model_can_be_copied(elsewhere, name):
    assert_same(elsewhere, name, "loaded")


@pytest.mark.parametrize("name", ["again", "third"])
def test_a_dynamically_loaded_model_can_be_saved_again(elsewhere, name):
    assert_same(elsewhere, name, "loaded")


def test_saving_again_keeps_the_code_and_the_requirements(elsewhere, saved):
    assert set(elsewhere["again_files"]) == {file.name for file in saved[0].iterdir()}
    original = json.loads((saved[0] / "config_sentence_transformers.json").read_text())
    assert elsewhere["again_config"]["requirements"] == original["requirements"]
    assert elsewhere["again_config"]["prompts"] == original["prompts"]


def test_a_dynamically_loaded_model_can_be_trained_and_saved(elsewhere):
    assert_same(elsewhere, "trained_reloaded", "trained")
    assert not torch.allclose(torch.tensor(elsewhere["trained"]), torch.tensor(elsewhere["loaded"]), atol=1e-3)


def test_two_repositories_of_one_name_keep_their_own_code(elsewhere):
    assert_same(elsewhere, "other", "expected", sign=-1)
    assert_same(elsewhere, "first_beside_other", "expected")
    assert_same(elsewhere, "first_reloaded", "expected")
    assert_same(elsewhere, "other_reloaded", "expected", sign=-1)


def test_an_adapter_alone_brings_attention_and_code(elsewhere):
    assert elsewhere["adapter_attention"] == "bidirectional"
    assert_same(elsewhere, "adapter", "adapted")


def test_a_users_subclass_loads_where_the_package_is_installed(elsewhere):
    assert_same(elsewhere, "user", "expected", sign=-1)


def test_an_untrusted_load_runs_no_code(saved):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(saved[0]))


# --- models that were saved by earlier code -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A design 5 with the code of commit 33d2e3d (17 files), and its vectors. Read only."""
    folder = tmp_path_factory.mktemp("old")
    shutil.unpack_archive(Path(__file__).parents[1] / "old_models" / "design_5_of_november_2026.zip", folder)
    return folder / "model", json.loads((folder / "vectors.json").read_text())


def assert_old_vectors(model: SentenceTransformer, expected: dict[str, Any]) -> None:
    for name, prompt in (("plain", None), ("query", "query")):
        found = model.encode(expected["texts"], prompt_name=prompt, convert_to_tensor=True)
        torch.testing.assert_close(found, torch.tensor(expected[name]), rtol=0, atol=1e-6)


def test_a_model_with_the_code_of_33d2e3d_loads_with_the_same_vectors_and_is_saved_again(old, tmp_path):
    folder, expected = old
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert_old_vectors(model, expected)
    assert "LLMTransformer has no batch_runner" in str(optimize_inference(model))
    model.save_pretrained(str(tmp_path))
    assert {file.name for file in tmp_path.glob("*.py")} == {file.name for file in folder.glob("*.py")}
    assert_old_vectors(SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu"), expected)


def test_the_package_reads_the_files_of_33d2e3d_and_saves_them_with_its_own_code(old, tmp_path):
    folder, expected = old
    modules = [
        LLMTransformer.load(str(folder)),
        MultiLayerPooling.load(str(folder), subfolder="1_MultiLayerPooling"),
        Normalize(),
    ]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "Find: "})
    assert_old_vectors(model, expected)
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "shortcut.py").exists()
    assert_old_vectors(SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu"), expected)
