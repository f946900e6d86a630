"""The block equals a slow loop in every form of its arithmetic, ignores padding, and keeps only what stays true."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from st_llmpool.modules.cross_attention import CrossAttention, Sizes
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.latent_attention_pooling import LatentAttentionPooling
from tests.modules.cross_attention_reference import paper_weights, slow_cross_attention

QUERIES = ["latents", "inputs"]


def trained_block(dimension: int = 8, *, queries: str = "latents", **sizes: float) -> CrossAttention:
    """A block in which every parameter, norms and biases too, is far from its start."""
    sizes = {"num_latents": 3, "num_heads": 2, "head_dim": 4, "mlp_ratio": 1} | sizes
    torch.manual_seed(0)
    block = CrossAttention(dimension, Sizes(**sizes), queries=queries)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return block


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """1e-5 of the largest value: weights here are large, so that outputs are, and float32 errors with them."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def kept(block: CrossAttention, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return block.eval()(inputs, mask)


def slow(block: CrossAttention, rows: Tensor) -> Tensor:
    return torch.tensor(slow_cross_attention(paper_weights(block), rows, block.sizes.num_heads, block.queries))


def plain(block: CrossAttention, inputs: Tensor) -> Tensor:
    """The block as textbooks compute it, in torch."""
    latents, normed = block.norm_latents(block.latents).expand(len(inputs), -1, -1), block.norm_inputs(inputs)
    asking, asked = (latents, normed) if block.queries == "latents" else (normed, latents)
    residual = block.latents if block.queries == "latents" else inputs

    def split(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (block.sizes.num_heads, block.sizes.head_dim)).transpose(1, 2)

    keys, values = block.to_key_value(asked).chunk(2, dim=-1)
    scores = split(block.to_query(asking)) @ split(keys).mT * block.sizes.head_dim**-0.5
    attended = residual + block.to_output((scores.softmax(-1) @ split(values)).transpose(1, 2).flatten(2))
    value, gate = block.to_value_gate(block.norm_feed_forward(attended)).chunk(2, dim=-1)
    return (attended + block.from_hidden(value * F.gelu(gate))).mean(dim=1)


@pytest.mark.parametrize("queries", QUERIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_size_gives_the_formula_folded_and_not(queries, data):
    size = st.integers(1, 5)
    block = trained_block(
        data.draw(st.integers(12, 17)),  # smaller ones make LayerNorm itself ill-conditioned
        queries=queries,
        num_latents=data.draw(size),
        num_heads=data.draw(size),
        head_dim=data.draw(st.integers(1, 12)),
        mlp_ratio=data.draw(st.sampled_from([0.5, 1, 2])),
    )
    inputs = torch.randn(2, data.draw(size), block.latents.shape[1]) * 3
    expected = torch.stack([slow(block, rows) for rows in inputs])
    assert_same(block(inputs), expected)
    assert_same(kept(block, inputs), expected)


@pytest.mark.parametrize(
    ("form", "folds", "merges_values", "num_inputs", "sizes"),
    [
        ("scores folded", True, False, 6, {"num_latents": 2, "num_heads": 1, "head_dim": 7}),
        ("scores and values folded", True, True, 6, {"num_latents": 2, "num_heads": 2, "head_dim": 16}),
        ("fewer inputs than latents", True, False, 2, {"num_latents": 5, "num_heads": 1, "head_dim": 7}),
        ("plain", False, False, 6, {"num_latents": 6, "num_heads": 8, "head_dim": 1}),
        ("plain, as the constants would hold more than the weights", False, False, 6, {"num_latents": 33}),
    ],
)
def test_each_form_of_inference_gives_the_formula(form, folds, merges_values, num_inputs, sizes, device):
    block, inputs = trained_block(8, **{"head_dim": 16} | sizes), torch.randn(2, num_inputs, 8) * 3
    expected = torch.stack([slow(block, rows) for rows in inputs])
    assert_same(kept(block.to(device), inputs.to(device)).cpu(), expected)
    folded = block._folded
    assert (folded is not None, folded is not None and folded.values is not None) == (folds, merges_values), form


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize(
    ("few", "num_texts", "sizes"),
    [
        ((False, False), 64, {"num_latents": 2, "num_heads": 8, "head_dim": 1}),
        ((False, True), 64, {"num_latents": 16, "head_dim": 4}),
        ((True, True), 2, {"num_latents": 40, "head_dim": 16}),
    ],
    ids=["latents through one matrix each", "each text's inputs are few", "all inputs are few"],
)
def test_gradients_are_those_of_the_textbook(queries, few, num_texts, sizes):
    block, inputs = trained_block(queries=queries, **sizes), torch.randn(num_texts, 5, 8)
    assert (block._are_few(num_texts * 5), block._are_few(5)) == few
    target = torch.randn(num_texts, 8)
    gradients = []
    for forward in (block, lambda x: plain(block, x)):
        block.zero_grad()
        x = inputs.clone().requires_grad_()
        (forward(x) * target).sum().backward()
        gradients.append({"inputs": x.grad, **{name: p.grad.clone() for name, p in block.named_parameters()}})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("queries", QUERIES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_masked_inputs_have_no_effect_wherever_they_stand_and_whatever_they_hold(queries, data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 3))
    texts = [torch.randn(length, 8) for length in lengths]
    inputs = torch.full((len(texts), width, 8), data.draw(st.sampled_from([0.0, 1e4, float("nan"), float("inf")])))
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        places = sorted(data.draw(st.permutations(range(width)))[: len(text)])
        inputs[row, places], mask[row, places] = text, True
    block = trained_block(queries=queries)
    alone = torch.cat([plain(block, text[None]) for text in texts])
    assert_same(block(inputs, mask), alone)
    assert_same(kept(block, inputs, mask), alone)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("shape", [(3, 700), (300, 7), (5, 1500)])
def test_more_rows_than_are_projected_at_a_time_give_the_same(queries, shape):
    block, inputs = trained_block(queries=queries, num_latents=5), torch.randn(*shape, 8)
    lengths = torch.randint(1, shape[1] + 1, (len(inputs),))
    mask = torch.arange(shape[1]) < lengths[:, None]
    alone = torch.cat([plain(block, text[None, :length]) for text, length in zip(inputs, lengths, strict=True)])
    assert_same(block(inputs, mask), alone)
    assert_same(kept(block, inputs, mask), alone)


@pytest.mark.parametrize("queries", QUERIES)
def test_masked_inputs_get_exactly_zero_gradient(queries):
    inputs = torch.randn(2, 6, 8, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    trained_block(queries=queries)(inputs, mask).square().sum().backward()
    assert inputs.grad[~mask].abs().max() == 0
    assert inputs.grad[mask].abs().min() > 0


def multiply_adds(forward: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("num_inputs", [1, 6, 24, 512])
@pytest.mark.parametrize(
    "sizes", [(64, 8, 8, 8), (64, 8, 64, 1), (64, 64, 4, 16), (96, 256, 16, 6), (48, 16, 4, 96), (48, 3, 6, 200)]
)
def test_folded_constants_never_cost_more_than_the_plain_arithmetic(queries, num_inputs, sizes):
    dimension, num_latents, num_heads, head_dim = sizes
    with torch.device("meta"):
        block = CrossAttention(dimension, Sizes(num_latents, num_heads, head_dim, mlp_ratio=1), queries=queries).eval()
        inputs = torch.empty(2, num_inputs, dimension)
    with torch.no_grad():
        block(inputs)
    assert multiply_adds(lambda: block(inputs)) <= multiply_adds(lambda: plain(block, inputs))


def test_a_small_batch_in_training_does_not_pay_for_the_projection_of_the_papers_latents():
    with torch.device("meta"):
        block = CrossAttention(896, Sizes(768, 32, 2048, 4))
        inputs = torch.empty(2, 24, 896)
    projection = block.latents.shape[0] * block.to_query.weight.numel()
    assert multiply_adds(lambda: block(inputs)) < projection


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("num_texts", [1, 4, 64])
@pytest.mark.parametrize("sizes", [Sizes(8, 8, 112, 1), Sizes(768, 32, 2048, 4)], ids=["compact", "paper"])
def test_training_never_costs_more_than_the_plain_arithmetic(queries, num_texts, sizes):
    with torch.device("meta"):
        block = CrossAttention(896, sizes, queries=queries)
        inputs = torch.empty(num_texts, 24, 896)
    assert multiply_adds(lambda: block(inputs)) <= multiply_adds(lambda: plain(block, inputs))


@pytest.mark.parametrize(("dimension", "limit"), [(896, 200 * 2**20), (4096, 400 * 2**20), (8192, 800 * 2**20)])
def test_folded_constants_of_the_papers_size_stay_small(dimension, limit):
    with torch.device("meta"):
        block = CrossAttention(dimension, Sizes(768, 32, 2048, 4)).eval()
        inputs = torch.empty(1, 32, dimension)
    with torch.no_grad():
        block(inputs)
    constants = block._folded
    held = sum(4 * tensor.numel() for tensor in (constants.scores, constants.values) if tensor is not None)
    assert held <= limit
    assert held < sum(4 * parameter.numel() for parameter in block.parameters()) / 4


def test_folded_constants_survive_eval_because_encode_calls_it_every_time():
    block, inputs = trained_block(), torch.randn(1, 4, 8)
    kept(block, inputs)
    first = block._folded
    kept(block, inputs)
    assert first is not None
    assert block._folded is first


def optimizer_step(block: CrossAttention) -> None:
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(torch.randn(2, 4, 8)).square().sum().backward()
    optimizer.step()


def assign_data(block: CrossAttention) -> None:
    block.to_output.weight.data = block.to_output.weight.data * 2


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        assign_data,
        lambda block: block.load_state_dict(trained_block(queries=block.queries, num_heads=2).double().state_dict()),
        lambda block: block.load_state_dict(
            {name: tensor * 2 for name, tensor in block.state_dict().items()}, assign=True
        ),
        lambda block: nn.init.normal_(block.latents),
        lambda block: nn.init.normal_(block.norm_latents.bias),
        lambda block: nn.init.normal_(block.to_query.weight),
        lambda block: nn.init.normal_(block.to_key_value.weight),
        lambda block: nn.init.normal_(block.to_output.weight),
    ],
)
def test_weight_change_changes_the_next_output(queries, change):
    block, inputs = trained_block(queries=queries), torch.randn(2, 5, 8)
    kept(block, inputs)
    change(block)
    with torch.no_grad():
        expected = plain(block, inputs)
    assert_same(kept(block, inputs), expected)


def test_no_other_weight_can_get_an_address_that_a_folded_constant_was_made_from():
    block = trained_block()
    addresses = {p.data_ptr() for p in (block.latents, block.to_query.weight, block.to_output.weight)}
    kept(block, torch.randn(1, 4, 8))
    assign_data(block)  # frees the old tensor, were it not held
    assert addresses <= {source.data_ptr() for source in block._folded.sources}


@pytest.mark.parametrize(
    "event", [lambda block: block.train(), lambda block: block.to("cpu"), lambda block: block.state_dict()]
)
def test_folded_constants_are_dropped_by_training_moving_and_saving(event):
    block = trained_block()
    kept(block, torch.randn(1, 4, 8))
    assert block._folded is not None
    event(block)
    assert block._folded is None


def test_dropping_reaches_the_block_inside_a_model():
    model = nn.Sequential(trained_block())
    for event in (lambda: model.train(), lambda: model.to("cpu"), lambda: model.state_dict()):
        kept(model[0], torch.randn(1, 4, 8))
        event()
        assert model[0]._folded is None


def test_state_dict_holds_the_weights_only():
    block = trained_block()
    before = set(block.state_dict())
    kept(block, torch.randn(1, 4, 8))
    assert set(block.state_dict()) == before == {name for name, _ in block.named_parameters()}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_give_the_same_output_and_hold_no_constants(duplicate):
    block, inputs = trained_block(), torch.randn(2, 4, 8)
    expected = kept(block, inputs)
    twin = duplicate(block)
    assert twin._folded is None
    assert block._folded is not None
    assert torch.equal(kept(twin, inputs), expected)


def test_torch_save_writes_no_constants():
    block, buffers = trained_block(), [io.BytesIO(), io.BytesIO()]
    torch.save(block, buffers[0])
    kept(block, torch.randn(1, 4, 8))
    torch.save(block, buffers[1])
    assert len(buffers[0].getvalue()) == len(buffers[1].getvalue())


def test_threads_that_share_a_block_agree():
    block, batches = trained_block(), [torch.randn(3, 4, 8) for _ in range(64)]
    expected = [kept(block, batch) for batch in batches]
    block._folded = None
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(lambda batch: kept(block, batch), batches))
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))


def test_eval_mode_with_gradients_reaches_every_parameter():
    block = trained_block()
    kept(block, torch.randn(2, 4, 8))
    block(torch.randn(2, 4, 8)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters())


def test_weights_made_in_inference_mode_keep_nothing_because_they_do_not_count_changes():
    with torch.inference_mode():
        block, inputs = trained_block(), torch.randn(2, 4, 8)
        kept(block, inputs)
        block.to_output.weight.mul_(2)
        assert_same(kept(block, inputs), plain(block, inputs))


@pytest.mark.parametrize("queries", QUERIES)
def test_compiles_to_one_graph(queries):
    block, inputs = trained_block(queries=queries).eval(), torch.randn(2, 4, 8)
    with torch.no_grad():
        compiled = torch.compile(block, backend="eager", fullgraph=True)(inputs)
    assert_same(compiled, plain(block, inputs).detach())


@pytest.mark.parametrize(("dimension", "head_dim"), [(1, 1), (7, 1), (30, 3), (4096, 512)])
def test_the_default_sizes_fit_every_hidden_size(dimension, head_dim):
    with torch.device("meta"):
        pooling = LatentAttentionPooling(dimension)
    assert pooling.cross_attention.sizes == Sizes(8, 8, head_dim, 1)


def test_heads_share_the_hidden_size():
    assert LatentAttentionPooling(64, num_heads=4).head_dim == 16


def test_config_holds_the_resolved_sizes_and_rebuilds_the_pooling():
    config = LatentAttentionPooling(64, num_latents=5).get_config_dict()
    assert config == {
        "embedding_dimension": 64,
        "num_latents": 5,
        "num_heads": 8,
        "head_dim": 8,
        "mlp_ratio": 1,
        "queries": "latents",
        "readout_skip": True,
    }
    assert LatentAttentionPooling(**config).get_config_dict() == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": "latent"}, "queries='latent' is unknown.*Did you mean 'latents'"),
        ({"num_latents": 0}, "num_latents=0 must be a positive integer"),
        ({"num_heads": 0}, "num_heads=0 must be a positive integer"),
        ({"head_dim": 2.5}, "head_dim=2.5 must be a positive integer"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 must be a number from 0.001 to 1000"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4' must be a number"),
        ({"num_heads": 2**16, "head_dim": 2**16}, "num_heads=65536 x head_dim=65536: a matrix may hold 4,294,967,296"),
    ],
)
def test_bad_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        LatentAttentionPooling(16, **arguments)
