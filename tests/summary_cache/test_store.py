"""The files of the cache: exact or scaled values, damage that is found, processes that share a folder."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from safetensors.torch import load_file, save_file

from st_llmpool.modules.errors import InputError
from st_llmpool.summary_cache import SummaryStore


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def rows(numbers: range, *, seed: int = 0) -> dict[bytes, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key(number): torch.randn(2, 3, 8, generator=generator) for number in numbers}


def shards(store: SummaryStore) -> list:
    return sorted(store.folder.glob("*.safetensors"))


def test_float32_gives_back_every_bit(tmp_path):
    store, written = SummaryStore(tmp_path, {}, dtype="float32"), rows(range(5))
    store.add(written)
    again = SummaryStore(tmp_path, {}, dtype="float32")
    for place, readout in enumerate(["eos", "mean"]):
        read = again.read(list(written), readout, [1, 2, 3])
        assert torch.equal(read, torch.stack(list(written.values()))[:, place])


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e4, 1e9, 1e30])
def test_float16_has_its_own_precision_at_any_scale_and_never_overflows(tmp_path, scale):
    store, written = SummaryStore(tmp_path, {}), {key(1): scale * torch.randn(2, 3, 8)}
    written[key(1)][0, 0, 0] *= 1000  # one feature far above the others, as LLMs have
    store.add(written)
    read, exact = store.read([key(1)], "eos", [1, 2, 3])[0], written[key(1)][0]
    assert ((read - exact).abs() <= 2**-11 * exact.abs()).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_are_the_same_under_autocast_to_bf16(tmp_path, dtype):
    store, written = SummaryStore(tmp_path, {}, dtype=dtype), rows(range(3))
    store.add(written)
    plain = store.read(list(written), "mean", [1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(store.read(list(written), "mean", [1, 3]), plain)


def test_a_vector_of_zeros_stays_one(tmp_path):
    store = SummaryStore(tmp_path, {})
    store.add({key(1): torch.zeros(2, 3, 8)})
    assert torch.equal(store.read([key(1)], "mean", [1, 2, 3]), torch.zeros(1, 3, 8))


def test_layers_are_read_in_the_order_asked_for(tmp_path):
    store, written = SummaryStore(tmp_path, {}, dtype="float32"), rows(range(2))
    store.add(written)
    assert torch.equal(store.read([key(1)], "mean", [3, 1])[0], written[key(1)][1, [2, 0]])


@pytest.mark.parametrize("change", [{"weights": "b"}, {"length": 2}, {"more": 1}])
def test_another_identity_is_another_folder(tmp_path, change):
    identity = {"weights": "a", "length": 1}
    SummaryStore(tmp_path, identity).add(rows(range(1)))
    assert key(0) in SummaryStore(tmp_path, identity)
    assert key(0) not in SummaryStore(tmp_path, {**identity, **change})
    assert key(0) not in SummaryStore(tmp_path, identity, dtype="float32")


def test_a_file_of_another_identity_is_not_read_wherever_it_lies(tmp_path, caplog):
    one, two = SummaryStore(tmp_path, {"weights": "a"}), SummaryStore(tmp_path, {"weights": "b"})
    one.add(rows(range(1)))
    shards(one)[0].rename(two.folder / "moved.safetensors")
    assert key(0) not in SummaryStore(tmp_path, {"weights": "b"})
    assert "another model" in caplog.text


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file_is_missing_with_a_warning(tmp_path, caplog, kept):
    store = SummaryStore(tmp_path, {})
    store.add(rows(range(10)))
    content = shards(store)[0].read_bytes()
    shards(store)[0].write_bytes(content[: int(kept * len(content))])
    assert len(SummaryStore(tmp_path, {})) == 0
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("tensor", ["keys", "exponents", "values", "checksums"])
def test_a_flipped_bit_loses_its_row_alone(tmp_path, caplog, tensor):
    store, written = SummaryStore(tmp_path, {}), rows(range(4))
    store.add(written)
    parts = load_file(shards(store)[0])
    parts[tensor][2].view(-1).view(torch.uint8)[0] ^= 1
    shards(store)[0].unlink()
    save_file(parts, store.folder / "0.safetensors", {"identity": store.identity})
    again = SummaryStore(tmp_path, {})
    assert [number for number in range(4) if key(number) in again] == [0, 1, 3]
    again.add({key(2): written[key(2)]})
    assert key(2) in again
    assert key(2) in SummaryStore(tmp_path, {})


def test_what_another_process_writes_is_found(tmp_path):
    one, two = SummaryStore(tmp_path, {}), SummaryStore(tmp_path, {})
    one.add(rows(range(3)))
    assert key(1) not in two
    two.refresh()
    assert key(1) in two


def test_a_check_is_made_until_it_has_passed_on_an_identity(tmp_path):
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise InputError("not yet")

    with pytest.raises(InputError):
        SummaryStore(tmp_path, {}).once("proof", check)
    for identity in ({}, {}, {"weights": "b"}):
        SummaryStore(tmp_path, identity).once("proof", check)
    assert len(calls) == 3


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path):
    store = SummaryStore(tmp_path, {})
    (store.folder / ".0.safetensors.999999999-1-x.partial").write_bytes(b"half")
    assert len(SummaryStore(tmp_path, {})) == 0


def _hold(folder, started, stop):
    with SummaryStore(folder, {}).lock("a", wait=True):
        started.set()
        stop.wait()


def test_a_lock_holds_off_another_process_and_ends_with_it(tmp_path):
    context = multiprocessing.get_context("fork")
    started, stop = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, started, stop))
    process.start()
    started.wait()
    store = SummaryStore(tmp_path, {})
    with store.lock("a", wait=False) as held, store.lock("b", wait=False) as other:
        assert (held, other) == (False, True)
    process.kill()
    with store.lock("a", wait=True) as held:
        assert held
    process.join()
