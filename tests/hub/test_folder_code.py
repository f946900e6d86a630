"""Whatever a folder holds or names as code is found, and told apart from the installed package's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from st_llmpool import build_embedder
from st_llmpool.hub.folder_code import find_code
from st_llmpool.modules import portable


@pytest.fixture(scope="module")
def saved(tiny_llm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_embedder(tiny_llm, verify=False).save_pretrained(str(folder))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy by links, as the Hub's cache has them."""
    for file in saved.rglob("*"):
        if file.is_file():
            link = tmp_path / "model" / file.relative_to(saved)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return tmp_path / "model"


def rewrite(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_model_that_the_installed_package_saved_has_nothing_to_trust(folder):
    code = find_code(folder)
    assert code.to_trust == ()
    assert code.idle == ()
    assert code.own == {
        "llm_transformer.LLMTransformer": "st_llmpool.modules.llm_transformer.LLMTransformer",
        "multi_layer_pooling.MultiLayerPooling": "st_llmpool.modules.multi_layer_pooling.MultiLayerPooling",
    }
    assert set(code.same) == {file.name for file in folder.glob("*.py")}


@pytest.mark.parametrize("name", ["errors.py", "llm_transformer.py", "multi_layer_pooling.py"])
def test_one_changed_byte_makes_a_file_foreign(folder, name):
    text = (folder / name).read_text()
    rewrite(folder / name, text[:-2] + "#" + text[-1])
    [said] = find_code(folder).foreign
    assert said.startswith(f"{name} (says st_llmpool {portable.__version__}")


def test_the_same_code_under_the_header_of_another_version_is_the_same_code(folder):
    text = (folder / "errors.py").read_text()
    rewrite(folder / "errors.py", text.replace(portable.__version__, "0.0.9", 1))
    assert find_code(folder).to_trust == ()
    rewrite(folder / "errors.py", "# -*- coding: utf-7 -*-\n" + text)
    assert find_code(folder).foreign == ("errors.py",)


@pytest.mark.parametrize("reference", ["os.system", "subprocess.Popen", "evil.Evil", "torch.load", "errors.Evil.x"])
def test_a_module_that_is_neither_ours_nor_sentence_transformers_is_foreign(folder, reference):
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": "", "type": reference})
    rewrite(folder / "modules.json", json.dumps(modules))
    assert find_code(folder).to_trust == (f"modules.json: type {reference!r}",)


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        ("1_Router/router_config.json", {"types": {"query_0_Evil": "evil.Evil"}}, "foreign"),
        ("1_Dense/config.json", {"activation_function": "evil.Evil"}, "foreign"),
        ("0_Words/wordembedding_config.json", {"tokenizer_class": "evil.Evil"}, "foreign"),
        (
            "sentence_bert_config.json",
            {"model_kwargs": {"attn_implementation": "evil/kernel", "allow_all_kernels": True}},
            "unasked",
        ),
        ("config.json", {"text_config": {"_attn_implementation": {"": "evil/kernel"}}}, "unasked"),
        ("config.json", {"kernel_config": {"RMSNorm": "evil/kernel:Norm"}}, "unasked"),
        ("adapter_config.json", {"megatron_config": {"size": "1"}, "megatron_core": "evil"}, "unasked"),
        ("adapter_config.json", {"auto_mapping": {"parent_library": "evil"}}, "named"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "named"),
        ("tokenizer_config.json", {"auto_map": ["evil.Evil", None]}, "named"),
        ("preprocessor_config.json", {"processor_class": "user/repo--evil.Evil"}, "named"),
        ("deep/in/a/folder/any.json", {"a": [{"b": {"auto_map": {"AutoConfig": "evil.Evil"}}}]}, "named"),
        ("config.json", {"custom_pipelines": {"text": {"impl": "evil.Evil"}}}, "named"),
        ("config.json", {"trust_remote_code": True}, "named"),
    ],
)
def test_names_of_code_are_found_in_any_file_at_any_depth(tmp_path, file, content, field):
    rewrite(tmp_path / file, json.dumps(content))
    [said] = getattr(find_code(tmp_path), field)[:1]
    assert said.startswith(f"{file}: ")


def test_a_key_that_is_written_in_escapes_is_found(tmp_path):
    (tmp_path / "config.json").write_text('{"\\u0061uto\\u005Fmap": {"AutoModel": "evil.Evil"}}')
    assert len(find_code(tmp_path).named) == 1


def test_what_names_no_code_is_left_alone(tmp_path):
    content = {
        "vocab": {"auto_map": 7, "trust_remote_code": 1, "types": 3},
        "auto_map": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "rope_scaling": {"type": "linear"},
        "architectures": ["LlamaModel"],
        "attn_implementation": "sdpa",
        "activation_function": "torch.nn.modules.activation.Tanh",
        "auto_mapping": {"parent_library": "transformers.models.llama.modeling_llama"},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text('{"auto_map": ')
    (tmp_path / "deep.json").write_text('{"auto_map": ' + "[" * 100_000)
    (tmp_path / "chat_template.jinja").write_text("{{ auto_map }}")
    assert find_code(tmp_path).to_trust == ()


def test_the_seal_of_an_adapter_names_no_code(tiny_llm, tmp_path):
    build_embedder(tiny_llm, peft_config="paper", verify=False).save_pretrained(str(tmp_path))
    assert "megatron_config" in (tmp_path / "st_llmpool.json").read_text()
    assert find_code(tmp_path).to_trust == ()


def test_python_files_that_nothing_names_are_listed_as_idle(folder):
    rewrite(folder / "handler.py", "print()")
    rewrite(folder / "scripts" / "errors.py", "print()")
    code = find_code(folder)
    assert set(code.idle) == {"handler.py", "scripts/errors.py"}
    assert code.to_trust == ()


def test_the_folder_of_an_adapters_base_is_looked_through_too(tmp_path):
    rewrite(tmp_path / "base" / "config.json", json.dumps({"auto_map": {"AutoModel": "evil.Evil"}}))
    adapter = {"base_model_name_or_path": str(tmp_path / "base")}
    rewrite(tmp_path / "model" / "adapter_config.json", json.dumps(adapter))
    [said] = find_code(tmp_path / "model").named
    assert said.startswith(f"{tmp_path / 'base'}/config.json: ")
    rewrite(tmp_path / "base" / "adapter_config.json", json.dumps({"base_model_name_or_path": str(tmp_path / "model")}))
    assert find_code(tmp_path / "model").named == (said,)


def test_folders_that_link_to_each_other_and_pipes_do_not_hang_the_walk(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    rewrite(tmp_path / "elsewhere" / "config.json", json.dumps({"auto_map": {"AutoModel": "evil.Evil"}}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    assert find_code(tmp_path / "model").named == ("1_Pooling/config.json: AutoModel 'evil.Evil'",)
    find_code(tmp_path)
