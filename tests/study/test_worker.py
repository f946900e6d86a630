from __future__ import annotations

import pandas as pd
import pytest

from st_llmpool.study import worker
from st_llmpool.study.records import finished, read_scores
from st_llmpool.study.worker import carry_out


def test_a_stopped_run_goes_on_and_gives_the_numbers_of_one_that_was_not(tiny_study, study_data, tmp_path, monkeypatch):
    run = tiny_study.runs()[1]
    carry_out(tiny_study, run, output_dir=tmp_path / "whole", work=tmp_path / "work-1", data_dir=study_data)

    def stop(folder, stage, **facts):
        if facts.get("step") == 3:
            raise KeyboardInterrupt

    def start():
        carry_out(tiny_study, run, output_dir=tmp_path / "stopped", work=tmp_path / "work-2", data_dir=study_data)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "write_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert not finished([run], tmp_path / "stopped")
    assert (tmp_path / "work-2" / run.id / "training" / "checkpoints" / "checkpoint-2").is_dir()
    start()

    folders = [tmp_path / name for name in ("whole", "stopped")]
    one, other = (read_scores(finished([run], folder), folder) for folder in folders)
    pd.testing.assert_frame_equal(one.scores, other.scores, check_exact=True)
    whole, stopped = (finished([run], folder)[0] for folder in folders)
    assert whole.training["losses"] == stopped.training["losses"]
    assert whole.validation == stopped.validation


def test_designs_see_the_same_texts_in_the_same_order(tiny_study, study_data, tmp_path, monkeypatch):
    from st_llmpool.training.trainer import EmbedderTrainer

    seen: list[list[list[int]]] = []
    original = EmbedderTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        features, _ = self.collect_features(inputs)
        seen[-1].append([column["input_ids"].tolist() for column in features])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EmbedderTrainer, "compute_loss", spy)
    for run in tiny_study.runs():
        seen.append([])
        carry_out(tiny_study, run, output_dir=tmp_path / "out", work=tmp_path / "work", data_dir=study_data)
    assert len(seen[0]) == 4
    assert seen[0] == seen[1]
