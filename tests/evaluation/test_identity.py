from __future__ import annotations

import pytest

from st_llmpool.evaluation.identity import identify
from st_llmpool.model_card.identity import fingerprint


def test_names_are_local_and_hold_the_folder_or_the_card_name(tmp_path, model):
    assert identify(model)[0] == "local/unnamed"
    model.model_card_data.model_name = "SentenceTransformer based on org/base"
    assert identify(model)[0] == "local/SentenceTransformer-based-on-org-base"
    model.save_pretrained(str(tmp_path / "my model"))
    assert identify(model, str(tmp_path / "my model"))[0] == "local/my-model"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("squad-5/model", "local/squad-5"),
        ("squad-5/checkpoints/checkpoint-60", "local/squad-5-checkpoint-60"),
        ("builtin_5_seed0/training/model", "local/builtin_5_seed0"),
        ("my-model", "local/my-model"),
    ],
)
def test_models_of_different_runs_have_different_names(tmp_path, model, folder, name):
    assert identify(model, str(tmp_path / folder))[0] == name


def test_hub_model_keeps_its_id_and_commit(model):
    model.model_card_data.base_model_revision = "c0ffee"
    assert identify(model, "org/model") == ("org/model", "c0ffee")
    assert identify(model)[1] == fingerprint(model)  # a copy trained further may keep the base's commit
