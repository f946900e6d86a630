from __future__ import annotations

from st_llmpool.evaluation.identity import identify
from st_llmpool.modules.portable import fingerprint


def test_names_are_local_and_hold_the_folder_or_the_card_name(tmp_path, model):
    assert identify(model)[0] == "local/unnamed"
    model.model_card_data.model_name = "SentenceTransformer based on org/base"
    assert identify(model)[0] == "local/SentenceTransformer-based-on-org-base"
    model.save_pretrained(str(tmp_path / "my model"))
    assert identify(model, str(tmp_path / "my model"))[0] == "local/my-model"


def test_hub_model_keeps_its_id_and_commit(model):
    model.model_card_data.base_model_revision = "c0ffee"
    assert identify(model, "org/model") == ("org/model", "c0ffee")
    assert identify(model)[1] == fingerprint(model)  # a copy trained further may keep the base's commit
