"""The proof must notice every way of getting attention wrong, and must not see one where there is none."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from torch import nn

from st_llmpool.attention_proof import VERDICTS, verify_attention
from st_llmpool.modules.attention import decoder_layers, set_attention
from st_llmpool.modules.errors import AttentionError, ConfigurationError
from tests.architecture_zoo import build

newest = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older transformers has no such model"
)


def bidirectional(name: str = "llama", implementation: str = "sdpa") -> nn.Module:
    model = build(name, implementation)
    set_attention(model, "bidirectional")
    return model


def force_mask(layer: nn.Module, change) -> None:
    """Makes one layer see another mask than the model built: `change(tokens, mask)` returns it."""

    def replace(module, args, kwargs):
        return args, {**kwargs, "attention_mask": change(args[0], kwargs["attention_mask"])}

    layer.register_forward_pre_hook(replace, with_kwargs=True)


def triangle(tokens, mask):
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()[None, None]
    return causal if mask is None else causal & mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_both_modes_are_proven_in_every_precision(name, dtype, device):
    model = build(name, "sdpa").to(device, dtype)
    assert verify_attention(model).verdict == "causal"
    set_attention(model, "bidirectional")
    report = verify_attention(model)
    assert (report.verdict, report.ok, report.causal_layers) == ("bidirectional", True, ())
    assert report.signal > 0.1


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers passes it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_modes_are_proven_on_flex_attention(dtype, device):
    # Compiled for a CPU it sometimes gives NaN, which is a matter of torch and the processor.
    with torch.compiler.set_stance("force_eager" if device == "cpu" else "default"):
        model = build("llama", "flex_attention").to(device, dtype)
        assert verify_attention(model).verdict == "causal"
        set_attention(model, "bidirectional")
        report = verify_attention(model)
    assert (report.verdict, report.causal_layers) == ("bidirectional", ())


def test_tiny_activations_are_measured_as_well_as_large_ones():
    model = bidirectional()
    reference = verify_attention(model).signal
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1e-3)
    report = verify_attention(model)
    assert report.verdict == "bidirectional"
    assert report.signal == pytest.approx(reference, rel=0.5)


def test_one_causal_layer_makes_the_verdict_partial_and_is_named():
    model = bidirectional()
    force_mask(decoder_layers(model)[1], triangle)
    report = verify_attention(model)
    assert (report.verdict, report.causal_layers, report.ok) == ("partial", (2,), False)
    assert verify_attention(model, "partial").ok


def test_a_causal_branch_inside_a_bidirectional_layer_is_named():
    report = verify_attention(bidirectional("falcon_h1"))
    assert report.verdict == "partial"
    assert all("mamba" in layer.causal_parts for layer in report.layers)


@newest
def test_a_convolution_inside_an_attention_module_is_named():
    report = verify_attention(bidirectional("zaya"))
    assert report.verdict == "partial"
    assert all(part.startswith("self_attn.") for layer in report.layers for part in layer.causal_parts)


def test_a_layer_that_drops_the_mask_leaks_padding():
    model = bidirectional()
    force_mask(decoder_layers(model)[0], lambda tokens, mask: None)
    assert verify_attention(model).verdict == "padding_leak"


def test_a_layer_that_is_causal_only_without_padding_makes_vectors_depend_on_the_batch():
    model = bidirectional()
    force_mask(decoder_layers(model)[1], lambda tokens, mask: triangle(tokens, None) if mask is None else mask)
    assert verify_attention(model).verdict == "batch_dependent"


def test_the_config_flag_alone_is_not_enough_for_stablelm():
    model = build("stablelm", "sdpa")
    model.config.is_causal = False
    assert verify_attention(model).verdict == "batch_dependent"


def test_the_module_flags_alone_are_not_enough_for_llama():
    model = bidirectional()
    model.config.is_causal = True
    assert not verify_attention(model, "bidirectional").ok


def test_absolute_positions_that_nobody_counts_depend_on_the_padding_side():
    assert verify_attention(build("gpt2", "sdpa")).verdict == "padding_side"


def test_a_flag_that_state_space_layers_ignore_is_noticed():
    model = bidirectional("mamba", "eager")
    report = verify_attention(model)
    assert (report.verdict, report.expected, report.ok) == ("causal", "bidirectional", False)


@newest
def test_layers_without_attention_do_not_count():
    report = verify_attention(build("nemotron_h", "sdpa"))
    assert report.verdict == "causal"
    assert "tokenwise" in {layer.direction for layer in report.layers}


@newest
def test_layers_that_share_keys_of_earlier_ones_raise_no_alarm():
    report = verify_attention(build("gemma3n_text", "sdpa"))
    assert report.ok
    assert {(layer.unpadded, layer.right, layer.left) for layer in report.layers[2:]} == {("tokenwise",) * 3}


def test_failure_names_architecture_layers_and_way_out():
    model = bidirectional()
    force_mask(decoder_layers(model)[1], triangle)
    with pytest.raises(AttentionError, match=r"LlamaModel \(sdpa, float32\).*causal in layers 2.*allow_partial"):
        verify_attention(model).raise_for_failure()
    verify_attention(model, "partial").raise_for_failure()


def test_the_claim_of_the_first_module_is_what_is_expected(tiny_llm):
    model = SentenceTransformer(tiny_llm, device="cpu")
    assert verify_attention(model).expected == "causal"
    model[0].attention = "bidirectional"
    assert not verify_attention(model).ok
    set_attention(model, "bidirectional")
    assert verify_attention(model).ok


def test_the_report_can_be_read_and_stored():
    report = verify_attention(bidirectional("jamba"))
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["verdict"] == report.verdict == "partial"
    assert stored["causal_layers"] == list(report.causal_layers)
    assert len(stored["layers"]) == len(report.layers)
    lines = str(report).splitlines()
    assert "JambaModel (sdpa, float32): partial, expected bidirectional -> NOT OK" in lines[0]
    assert any(line.split()[0] == "5" and "bidirectional" in line for line in lines)


def test_an_unknown_expectation_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=f"expected='sideways' is unknown.*{VERDICTS[0]}.*{VERDICTS[-1]}"):
        verify_attention(build("llama", "sdpa"), "sideways")


def test_broken_weights_are_an_error_and_not_a_verdict():
    model = build("llama", "sdpa")
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(AttentionError, match="NaN or infinity"):
        verify_attention(model)


def test_a_model_that_needs_an_image_is_refused():
    with pytest.raises(AttentionError, match="cannot run on token ids and a mask alone"):
        verify_attention(build("blip-2", "eager"))


def test_the_proof_leaves_everything_as_it_was():
    model = bidirectional("gpt2")
    model.train()
    model.h[0].eval()
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    config = model.config.to_dict()
    verify_attention(model)
    verify_attention(model, light=True)
    assert torch.equal(torch.rand(3), expected_draw)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert config == model.config.to_dict()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_proof_is_the_same_each_time():
    model = bidirectional()
    assert verify_attention(model) == verify_attention(model)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_the_light_form_notices_a_lost_flag(name):
    model = bidirectional(name)
    assert verify_attention(model, light=True).ok
    set_attention(model, "causal")
    assert not verify_attention(model, "bidirectional", light=True).ok
    assert verify_attention(model, light=True).ok


def test_the_light_form_accepts_what_it_cannot_tell_from_partial():
    model = bidirectional("bamba")
    assert verify_attention(model, "partial", light=True).ok
    assert not verify_attention(build("bamba", "sdpa"), "partial", light=True).ok


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "embed_tokens"]}, {"trainable_token_indices": [5, 6]}], ids=str
)
def test_a_model_whose_embedding_peft_has_wrapped_is_proven(options):
    model = get_peft_model(bidirectional("llama"), LoraConfig(**options))
    assert verify_attention(model, "bidirectional").ok
    assert verify_attention(model, "bidirectional", light=True).ok
