import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from st_llmpool.modules import ScalarMixPooling
from st_llmpool.training.pooling_change import PoolingChange


def features(summaries, readout):
    return {"layer_summaries": torch.tensor(summaries), "readout": torch.tensor(readout)}


def test_the_change_is_the_mean_over_the_texts_since_the_last_reading():
    pooling = ScalarMixPooling(embedding_dimension=2, num_layers=1)
    change = PoolingChange([pooling])
    # Layer normalisation of (1, 3) is (-1, 1).
    pooling(features([[[1.0, 3.0]], [[1.0, 3.0]]], [[-1.0, 1.0], [-2.0, 2.0]]))  # changes 0 and 1/2
    pooling(features([[[1.0, 3.0]]], [[1.0, 1.0]]))  # difference (-2, 0), change sqrt 2
    assert change.pop_mean() == pytest.approx((0 + 0.5 + 2**0.5) / 3, abs=1e-4)
    assert change.pop_mean() is None


def test_evaluation_does_not_count():
    pooling = ScalarMixPooling(embedding_dimension=2, num_layers=1).eval()
    change = PoolingChange([pooling])
    pooling(features([[[1.0, 3.0]]], [[1.0, 1.0]]))
    assert change.pop_mean() is None


def test_nothing_is_measured_after_remove_or_on_a_pooling_without_weights():
    pooling = ScalarMixPooling(embedding_dimension=2, num_layers=1)
    change = PoolingChange([Pooling(2), pooling])
    change.remove()
    pooling(features([[[1.0, 3.0]]], [[1.0, 1.0]]))
    assert change.pop_mean() is None
