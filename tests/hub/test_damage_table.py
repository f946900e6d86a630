"""The short form of the damage table: no damage to a saved model passes the doctor, or loading, unnoticed."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest

from st_llmpool.hub.seal_checks import seal_findings
from st_llmpool.modules.errors import DataError
from st_llmpool.modules.seal import check_seal
from tests.hub.damage_table import damages, save_form


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_every_damage_fails_the_doctor_and_is_refused_or_named_at_load(tmp_path: Path, adapter: bool, caplog):
    folder = save_form(tmp_path, "5", adapter=adapter)
    assert all(finding.status != "failed" for finding in seal_findings(folder))
    for kind, name, content in list(damages(folder, 2, 2, random.Random(1))):
        file, before = folder / name, (folder / name).read_bytes()
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        assert any(finding.status == "failed" for finding in seal_findings(folder)), (kind, name)
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING):
                check_seal(str(folder))
        except (DataError, UnicodeDecodeError):
            refused = True
        else:
            refused = False
        is_weights = kind == "bit flip" and name.endswith(".safetensors")
        assert refused or is_weights or (name in caplog.text and kind in ("bit flip", "edit")), (kind, name)
        file.write_bytes(before)
