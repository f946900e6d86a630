"""The loss against one text at a time, full logits, in float64."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from st_llmpool import set_attention
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import adapt
from st_llmpool.training.mntp.masked_next_token import masked_logits, masked_loss
from st_llmpool.training.mntp.masked_texts import collate

from .test_adaptation import make

TEXTS = [
    ([11, 12, 13, 14, 15, 16, 17], {1: 30, 4: 31}),
    ([21, 22, 23], {2: 32}),
    ([41, 42, 43, 44, 45], {1: 33, 2: 34, 4: 35}),
]


@pytest.fixture(params=["bidirectional", "causal"])
def model(request, tiny_lm):
    loaded = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float64)
    set_attention(loaded, request.param)
    return loaded.eval()


def batch(padding_side: str) -> dict[str, torch.Tensor]:
    examples = []
    for ids, masked in TEXTS:
        labels = [masked.get(place, -100) for place in range(len(ids))]
        examples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return collate(examples, padding_side=padding_side)


def slow_loss(model) -> torch.Tensor:
    """Every text alone and whole; each masked token scored by the softmax at the place before it."""
    losses = []
    for ids, masked in TEXTS:
        probabilities = model(torch.tensor([ids]), use_cache=False).logits[0].softmax(dim=-1)
        losses += [-torch.log(probabilities[place - 1, token]) for place, token in masked.items()]
    return torch.stack(losses).sum()


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_loss_and_gradients_are_those_of_each_text_alone(model, padding_side):
    expected = slow_loss(model)
    expected_gradients = gradients(model, expected)
    loss = masked_loss(*masked_logits(model, model.get_output_embeddings(), **batch(padding_side)))
    # Left padding moves the positions, whose angles transformers computes in float32 whatever the model's dtype.
    rtol, atol = (1e-10, 1e-12) if padding_side == "right" else (1e-6, 1e-7)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=rtol, atol=atol, msg=name)


def test_the_head_reads_only_what_it_is_to_predict_from(model):
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    _, targets = masked_logits(model, head, **batch("right"))
    handle.remove()
    assert seen == [(1, 6, model.config.vocab_size)]
    assert targets.tolist() == [30, 31, 32, 33, 34, 35]
    assert model(batch("right")["input_ids"]).logits.shape[:2] == (3, 7)  # and afterwards everything again


def test_what_a_model_does_with_its_logits_still_happens():
    """Gemma 2 squeezes them into -30 to 30."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(**sizes, head_dim=8, num_hidden_layers=2, vocab_size=50, final_logit_softcapping=0.01)
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(config).eval()
    whole = batch("right")
    logits, _ = masked_logits(capped, capped.get_output_embeddings(), **whole)
    full = capped(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits
    torch.testing.assert_close(logits[0], full[0, 0])
    assert logits.abs().max() <= 0.01


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).half()
    targets = torch.arange(300) % 40
    expected = -logits.double().log_softmax(dim=-1)[torch.arange(300), targets].sum()
    assert masked_loss(logits, targets).dtype == torch.float32
    assert masked_loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_does_not_call_its_head_is_refused(model):
    unused = torch.nn.Linear(32, 5)
    with pytest.raises(ConfigurationError, match="does not call its head"):
        masked_logits(model, unused, **batch("right"))


def test_accumulated_batches_are_averaged(tiny_lm, words_file, tmp_path):
    """Each text has one masked token, so two batches of 2 have the loss and the gradient of one batch of 4."""
    masking, training = {"mlm_probability": 0.01}, {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1}
    of = {}
    for size, batches in ((4, 1), (2, 2)):
        values = training | {"batch_size": size, "gradient_accumulation_steps": batches, "max_grad_norm": 1e-3}
        recipe = make(tmp_path / str(size), tiny_lm, words_file, masking=masking, tune="full", training=values)
        result = adapt(recipe)
        log = json.loads(next((tmp_path / str(size)).glob("checkpoints/*/trainer_state.json")).read_text())[
            "log_history"
        ]
        of[size] = [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry], result.report["steps"]
    assert of[4][1] == of[2][1] == 2
    torch.testing.assert_close(torch.tensor(of[2][0]), torch.tensor(of[4][0]), rtol=1e-4, atol=1e-5)
