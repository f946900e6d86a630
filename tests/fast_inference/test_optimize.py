"""One call switches the fast paths on, compares them with the plain way, and leaves no trace when it is undone."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

from st_llmpool import build_embedder, optimize_inference
from st_llmpool.attention_proof import PACKED_SDPA
from st_llmpool.fast_inference import optimize, optimized_inference
from st_llmpool.fast_inference.length_groups import CPU_FORWARD_COST
from st_llmpool.fast_inference.optimize import FastInference
from st_llmpool.model_card.identity import fingerprint
from st_llmpool.modules.layer_readout import TokenSpans
from tests.fast_inference.test_shared_start import SIZES
from tests.modules.token_batches import computed_tokens

TEXTS = ["the quick brown fox " * count for count in (1, 9, 2, 1, 8, 3)]


@pytest.fixture
def model(tiny_llm: str) -> SentenceTransformer:
    return build_embedder(tiny_llm, attention="causal", pooling="multi_layer", verify=False, device="cpu")


def encode(model: SentenceTransformer) -> Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


def shapes_of(model: SentenceTransformer) -> list[tuple[int, int]]:
    with computed_tokens(model[0]) as shapes:
        encode(model)
    return shapes


def test_it_is_off_until_it_is_switched_on_and_undone_without_a_trace(model):
    config, state = copy.deepcopy(model[0].config), dict(vars(model[0]))
    plain, expected = shapes_of(model), encode(model)
    assert str(optimize_inference(model)) == "fast inference: shared start, packing, length groups"
    assert shapes_of(model) != plain
    torch.testing.assert_close(encode(model), expected, rtol=0, atol=1e-5)
    assert str(optimize_inference(model, False)) == "plain inference: switched off"
    assert shapes_of(model) == plain
    assert torch.equal(encode(model), expected)
    assert model[0].config._attn_implementation == config._attn_implementation
    state["batch_runner"] = None
    assert vars(model[0]).keys() - state.keys() == set()


def test_nothing_of_it_is_saved_and_a_saved_model_runs_plainly(model, tmp_path):
    before, identity = tmp_path / "before", fingerprint(model)
    model.save_pretrained(str(before))
    optimize_inference(model)
    assert fingerprint(model) == identity
    model.save_pretrained(str(tmp_path / "after"))
    names = {str(file.relative_to(before)) for file in before.rglob("*") if file.is_file()}
    for name in names - {"README.md", "st_llmpool.json"}:
        if not name.startswith("assets"):
            assert (before / name).read_bytes() == (tmp_path / "after" / name).read_bytes(), name
    assert PACKED_SDPA not in "".join(file.read_text() for file in (tmp_path / "after").rglob("*.json"))
    loaded = SentenceTransformer(str(tmp_path / "after"), trust_remote_code=True, device="cpu")
    assert loaded[0].batch_runner is None
    torch.testing.assert_close(encode(loaded), encode(model), rtol=0, atol=1e-5)
    assert optimize_inference(loaded).uses("packing")  # a repository's copy of our code has the same extension point


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_an_optimised_model_are_optimised_and_independent(model, copied):
    optimize_inference(model)
    fast = shapes_of(model)
    twin = copied(model)
    assert shapes_of(twin) == fast
    optimize_inference(twin, False)
    assert shapes_of(twin) != fast
    assert shapes_of(model) == fast


def test_training_and_gradients_of_an_optimised_model_are_those_of_the_plain_one(model):
    twin = copy.deepcopy(model)
    optimize_inference(model)
    gradients = []
    for each in (model, twin):
        each.train()
        with computed_tokens(each[0]) as shapes:
            each(each.preprocess(TEXTS))["sentence_embedding"][:, 0].sum().backward()
        assert shapes == [(6, shapes[0][1])]
        gradients.append([parameter.grad for parameter in each.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_the_mode_of_the_model_stays_as_it_was(model):
    model.train()
    model[0].model.eval()  # frozen, for instance
    modes = {module: module.training for module in model.modules()}
    optimize_inference(model)
    assert {module: module.training for module in model.modules()} == modes


def test_a_block_restores_what_was_there(model):
    with optimized_inference(model) as used:
        assert model[0].batch_runner is used
        with optimized_inference(model) as inner:
            assert inner is used
        assert model[0].batch_runner is used
    assert model[0].batch_runner is None


def test_other_models_run_plainly_and_the_report_says_so(tiny_llm):
    model = SentenceTransformer(modules=[Transformer(tiny_llm), Pooling(32)], device="cpu")
    assert str(optimize_inference(model)) == "plain inference: Transformer has no batch_runner"
    with optimized_inference(model) as used:
        assert not used.uses("packing")


def test_a_replaced_attention_implementation_is_obeyed(model):
    optimize_inference(model)
    model[0].model.set_attn_implementation("eager")
    assert all(rows > 1 or columns < 12 for rows, columns in shapes_of(model))
    assert model[0].model.config._attn_implementation == "eager"


# --- the comparison -------------------------------------------------------------------------------------------------


def probe_widths(monkeypatch: pytest.MonkeyPatch, model: SentenceTransformer) -> tuple[FastInference, list[int]]:
    widths: list[int] = []
    probe = optimize._probe
    monkeypatch.setattr(
        optimize, "_probe", lambda *args: (found := probe(*args), widths.append(found["input_ids"].shape[1]))[0]
    )
    return optimize_inference(model), widths


def test_windows_are_exceeded_by_a_probe_on_both_sides(make_llm, monkeypatch):
    model = build_embedder(make_llm(MistralConfig(**SIZES, sliding_window=60)), attention="causal", pooling="mean")
    found, widths = probe_widths(monkeypatch, model)
    assert widths == [31, 31, 84, 84]
    assert found.longest is None


def test_texts_longer_than_a_window_that_is_too_long_to_probe_run_plainly(make_llm, monkeypatch):
    monkeypatch.setitem(optimize._LONGEST_PROBE, "cpu", 64)
    model = build_embedder(make_llm(MistralConfig(**SIZES, sliding_window=60)), attention="causal", pooling="mean")
    found, widths = probe_widths(monkeypatch, model)
    assert widths == [31, 31]
    assert "texts up to 60 tokens" in str(found)
    with computed_tokens(model[0]) as shapes:
        model.encode(["zebra " * 12, "fox", "fox"])
        model.encode(["zebra " * 7, "fox", "fox"])
    assert shapes[0][0] == 3
    assert shapes[1][0] == 1


def test_a_window_that_no_text_reaches_needs_no_probe(make_llm, monkeypatch):
    config = MistralConfig(**SIZES, sliding_window=100)
    model = build_embedder(make_llm(config), attention="causal", pooling="mean", max_seq_length=64)
    found, widths = probe_widths(monkeypatch, model)
    assert widths == [31, 31]
    assert found.longest is None


def test_short_limits_are_kept_by_the_probes(make_llm):
    model = build_embedder(make_llm(LlamaConfig(**SIZES)), attention="causal", pooling="mean", max_seq_length=8)
    assert optimize_inference(model).uses("packing")


def test_one_wrong_layer_is_not_hidden_by_the_others():
    spans = TokenSpans(torch.ones(1, 5, dtype=torch.bool))
    layers = torch.ones(1, 100, 8)
    right = {"token_embeddings": torch.ones(1, 5, 8), "layer_summaries": layers}
    wrong = right | {"layer_summaries": torch.cat([layers[:, 1:], 1.01 * layers[:, :1]], dim=1)}
    assert optimize._difference(right, right, spans) == 0
    assert optimize._difference(right, wrong, spans) == pytest.approx(0.01, rel=1e-3)


def test_values_that_are_not_finite_differ():
    spans = TokenSpans(torch.ones(1, 5, dtype=torch.bool))
    right = {"token_embeddings": torch.ones(1, 5, 8)}
    assert optimize._difference(right, {"token_embeddings": torch.full((1, 5, 8), torch.nan)}, spans) == torch.inf


def test_probes_leave_out_prompts_as_texts_do(tiny_llm):
    model = build_embedder(tiny_llm, attention="causal", pooling="mean", include_prompt=False)
    found: dict[str, Any] = optimize_inference(model).differences
    assert found.keys() == {"shared start", "packing", "length groups"}
    assert max(found.values()) < 1e-5


def test_the_overhead_of_a_forward_is_a_constant_on_a_cpu_and_measured_elsewhere(model, monkeypatch):
    assert optimize_inference(model).forward_cost == CPU_FORWARD_COST
    before = encode(model)
    measured = []

    def measure(forward):
        measured.extend([forward(1, 8)(), forward(3, 1000)()])
        return 64

    monkeypatch.setattr(optimize, "measure_forward_cost", measure)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.transformers_model), "device", property(lambda backbone: torch.device("mps")))
        assert optimize_inference(model).forward_cost == 64
    assert all(map(math.isfinite, measured))
    assert torch.allclose(encode(model), before, atol=1e-5)
