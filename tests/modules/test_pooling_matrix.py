"""Every registered pooling in every situation; a new registry line is covered without a change here."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_llmpool import POOLINGS, build_embedder

TEXTS = ["fox", "the quick brown fox jumps over", "lazy dog the lazy"]
PROMPT = "over the dog: "
OVER_LAYERS = [name for name, spec in POOLINGS.items() if "reads" in inspect.signature(spec.module).parameters]
CASES = {name: (name, {}) for name in POOLINGS} | {
    f"{name} over layers": (name, {"reads": "layers"}) for name in OVER_LAYERS
}


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def build(tiny_llm: str, attention: str) -> Callable[[str], SentenceTransformer]:
    def build(case: str) -> SentenceTransformer:
        pooling, options = CASES[case]
        fixed = {"attention": attention, "device": "cpu", "verify": False}
        return build_embedder(tiny_llm, pooling=pooling, pooling_kwargs=options, **fixed)

    return build


@pytest.fixture(scope="module")
def model(build: Callable[[str], SentenceTransformer], case: str) -> SentenceTransformer:
    """A model whose pooling does something: a trainable one starts as its plain baseline."""
    model = build(case).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens_of(model: SentenceTransformer, prompt: str) -> tuple[list[Tensor], int]:
    ids = [torch.tensor(model.tokenizer(prompt + text)["input_ids"]) for text in TEXTS]
    # The prompt's last token, a space, merges with the first word of each text: it is not the prompt's alone.
    return ids, len(model.tokenizer(prompt.rstrip())["input_ids"]) - 1 if prompt else 0


def padded(ids: list[Tensor], side: str, prompt_length: int) -> dict[str, object]:
    width = max(len(row) for row in ids) + 3
    batch, mask = torch.full((len(ids), width), 1), torch.zeros(len(ids), width, dtype=torch.long)
    for index, row in enumerate(ids):
        free = width - len(row)
        start = {"left": free, "right": 0, "both": free // 2}[side]
        batch[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return {"input_ids": batch, "attention_mask": mask, "prompt_length": prompt_length}


def flat(ids: list[Tensor], attention: str, prompt_length: int) -> dict[str, object]:
    """Flat features by hand; a block mask keeps texts apart, as FlashAttention does with the offsets."""
    lengths = torch.tensor([len(row) for row in ids])
    text = torch.repeat_interleave(torch.arange(len(ids)), lengths)
    allowed = text[:, None] == text[None, :]
    if attention == "causal":
        allowed = allowed & torch.ones_like(allowed).tril()
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": allowed[None, None],
        "cu_seq_lens_q": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "prompt_length": prompt_length,
    }


def embed(model: SentenceTransformer, features: dict[str, object]) -> Tensor:
    with torch.no_grad():
        return model(features)["sentence_embedding"].float()


def alone(model: SentenceTransformer, ids: list[Tensor], prompt_length: int) -> Tensor:
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones(1, len(row)).long(), "prompt_length": prompt_length}
        for row in ids
    ]
    return torch.cat([embed(model, row) for row in rows])


@pytest.mark.parametrize("include_prompt", [True, False], ids=["prompt kept", "prompt excluded"])
@pytest.mark.parametrize("layout", ["left", "right", "both", "flat"])
def test_a_text_has_one_embedding_in_every_batch(model, attention, layout, include_prompt):
    model.set_pooling_include_prompt(include_prompt)
    ids, prompt_length = tokens_of(model, PROMPT)
    batch = flat(ids, attention, prompt_length) if layout == "flat" else padded(ids, layout, prompt_length)
    torch.testing.assert_close(embed(model, batch), alone(model, ids, prompt_length), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["left", "right", "both", "flat"])
def test_a_bfloat16_backbone_gives_the_float32_embedding_up_to_its_rounding(model, attention, layout):
    model.set_pooling_include_prompt(True)
    ids, prompt_length = tokens_of(model, "")
    reference = alone(model, ids, prompt_length)
    batch = flat(ids, attention, prompt_length) if layout == "flat" else padded(ids, layout, prompt_length)
    model.to(torch.bfloat16)
    try:
        low = embed(model, batch)
    finally:
        model.to(torch.float32)
    assert torch.nn.functional.cosine_similarity(low, reference).min() > 0.99


def test_excluding_the_prompt_changes_what_is_pooled(model, case):
    ids, prompt_length = tokens_of(model, PROMPT)
    model.set_pooling_include_prompt(True)
    kept = alone(model, ids, prompt_length)
    model.set_pooling_include_prompt(False)
    excluded = alone(model, ids, prompt_length)
    # The last token is never the prompt's, so what reads it alone does not change.
    pooling, options = CASES[case]
    reads_readout = POOLINGS[pooling].reads_with(options) != "tokens"
    reads_last_token = model[0].layer_readout == "eos" and reads_readout
    unchanged = reads_last_token or pooling in ("eos", "lasttoken")
    assert torch.allclose(kept, excluded, atol=1e-6) == unchanged


def test_saving_and_loading_keeps_the_embedding(model, tmp_path):
    model.set_pooling_include_prompt(False)
    expected = model.encode(TEXTS, prompt=PROMPT, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path))
    reloaded = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(
        reloaded.encode(TEXTS, prompt=PROMPT, convert_to_tensor=True), expected, rtol=0, atol=1e-5
    )
    assert not list(tmp_path.rglob("*.bin"))


def test_an_untrained_trainable_pooling_is_its_plain_baseline(build, attention, case):
    if not getattr(POOLINGS[CASES[case][0]].module, "is_st_llmpool_module", False) or case == "scalar_mix":
        pytest.skip("has no readout to start from")
    models = [build(name) for name in (case, "eos" if attention == "causal" else "mean")]
    untrained, baseline = (model.encode(TEXTS, convert_to_tensor=True) for model in models)
    torch.testing.assert_close(untrained, baseline, rtol=0, atol=1e-6)
