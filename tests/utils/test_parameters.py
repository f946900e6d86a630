"""Weights are counted as what they are, however few bits each takes."""

from __future__ import annotations

import pytest

from st_llmpool import build_embedder
from st_llmpool.utils.parameters import count_parameters, count_weights


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_model_has_as_many_weights_as_the_model_in_full(tiny_llm, quantization):
    whole = build_embedder(tiny_llm, pooling="scalar_mix", verify=False)
    model = build_embedder(tiny_llm, pooling="scalar_mix", quantization_config=quantization, verify=False)
    assert count_parameters(model) == count_parameters(whole)
    assert count_weights(model.parameters()) == sum(parameter.numel() for parameter in whole.parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, 4 * 4 * (32 + 32)),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, 4 * 4 * (32 + 32) + 9 * 32),
        ({"trainable_token_indices": [5, 6], "target_modules": ["q_proj"]}, 4 * 4 * (32 + 32) + 2 * 32),
    ],
)
def test_all_that_an_adapter_adds_is_the_adapters(tiny_llm, options, expected):
    whole = build_embedder(tiny_llm, pooling="mean", verify=False)
    model = build_embedder(tiny_llm, pooling="mean", verify=False, peft_config={"r": 4, **options})
    counts = count_parameters(model)
    assert counts["adapter"] == expected
    assert counts["backbone"] == count_parameters(whole)["backbone"]
