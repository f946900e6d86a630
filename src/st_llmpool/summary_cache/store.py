"""The files of the cache: layer summaries by text, in shards that are written once and never changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..modules.layer_readout import READOUTS
from ..utils.files import atomic_file, reraise_as_write_error

logger = logging.getLogger(__name__)

#: Storage dtypes by the names that a recipe has.
DTYPES = {"float16": torch.float16, "float32": torch.float32}
#: Power of two to which the largest number of a vector is scaled in float16, which ends at 2**16.
_LARGEST = 15
_KEY_BYTES = 16


@dataclass
class _Shard:
    path: Path
    keys: Tensor  # (N, 16) of bytes
    values: Tensor  # (N, 2, L, D), mapped from the file
    exponents: Tensor  # (N, 2, L): a vector is its values times 2 to this power
    checksums: list[int]
    checked: set[int] = field(default_factory=set)

    def fault(self, row: int) -> bool:
        """Return whether a row differs from what was written; each row is read for this once in a process."""
        if row not in self.checked:
            if _checksum(self.keys[row], self.exponents[row], self.values[row]) != self.checksums[row]:
                return True
            self.checked.add(row)
        return False


class SummaryStore:
    """Layer summaries of texts, both readouts of all layers, in one folder for everything that decides their values.

    A shard is a safetensors file with the identity in its metadata. It is written under a temporary name, renamed, and
    never changed, so that processes can share a folder. Each row has a checksum: a damaged row or file counts as
    missing, with a warning. In float16 each vector is scaled by a power of two to the dtype's range, so that the
    relative error of a number is at most 2**-11 (subnormal ones aside) and nothing overflows; float32 is exact.

    Args:
        folder: Parent of the store's own folder, which is named by the identity's digest.
        identity: What decides the values besides the text: weights, tokenizer, attention, length, ...
        dtype: A name in :data:`DTYPES`.

    Example:
        >>> store = SummaryStore(Path("cache"), {"base": "x"})
        >>> store.add({b"0123456789abcdef": torch.tensor([[[3.0, 1e9]], [[0.0, 0.5]]])})  # (2, L, D)
        >>> store.read([b"0123456789abcdef"], "mean", [1])
        tensor([[[0.0000, 0.5000]]])
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, dtype: str = "float16") -> None:
        self.identity = json.dumps({**identity, "dtype": dtype, "format": 1}, sort_keys=True, default=str)
        self.dtype = DTYPES[dtype]
        self.folder = folder / hashlib.sha256(self.identity.encode()).hexdigest()[:32]
        self._shards: dict[str, _Shard] = {}
        self._rows: dict[bytes, tuple[_Shard, int]] = {}
        with reraise_as_write_error(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        """Return whether the summaries of a text are there and undamaged."""
        if key not in self._rows:
            return False
        shard, row = self._rows[key]
        if shard.fault(row):
            logger.warning("%s is damaged in row %d; its text is encoded again.", shard.path, row + 1)
            del self._rows[key]
            return False
        return True

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._rows)

    def refresh(self) -> None:
        """Find what other processes have written since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._shards and (shard := self._open(path)) is not None:
                self._shards[path.name] = shard
                keys = shard.keys.numpy().tobytes()
                for row in range(len(shard.checksums)):  # the newest file wins: it may replace a damaged row
                    self._rows[keys[row * _KEY_BYTES : (row + 1) * _KEY_BYTES]] = (shard, row)

    def read(self, keys: Sequence[bytes], readout: str, layers: Sequence[int]) -> Tensor:
        """Return the summaries (B, len(layers), D) of texts that are there, in float32; layers count from 1."""
        if not all(key in self._rows for key in keys):  # another process has encoded them for this one
            self.refresh()
        place, chosen = READOUTS.index(readout), torch.tensor(layers) - 1
        rows = [self._rows[key] for key in keys]
        # In float32 before they are stacked: autocast to bf16 on a CPU cannot stack float16.
        values = torch.stack([shard.values[row, place].index_select(0, chosen).float() for shard, row in rows])
        if self.dtype == torch.float32:
            return values
        exponents = torch.stack([shard.exponents[row, place].index_select(0, chosen) for shard, row in rows])
        return torch.ldexp(values, exponents.unsqueeze(-1))

    def add(self, summaries: Mapping[bytes, Tensor]) -> None:
        """Write the summaries (2, L, D) of texts, of both readouts in the order of ``READOUTS``, as one file.

        Raises:
            WriteError: If the disk is full or read-only.
        """
        rows = torch.stack(list(summaries.values())).float()
        exponents = torch.zeros(rows.shape[:3], dtype=torch.int32)
        if self.dtype != torch.float32:
            exponents = torch.frexp(rows.abs().amax(dim=-1))[1] - _LARGEST
        values = torch.ldexp(rows, -exponents.unsqueeze(-1)).to(self.dtype)
        keys = torch.frombuffer(bytearray(b"".join(summaries)), dtype=torch.uint8).view(-1, _KEY_BYTES)
        sums = [_checksum(*parts) for parts in zip(keys, exponents, values, strict=True)]
        tensors = {"keys": keys, "exponents": exponents, "values": values, "checksums": torch.tensor(sums)}
        with atomic_file(self.folder / f"{time.time_ns():020d}-{os.getpid()}.safetensors") as partial:
            save_file(tensors, partial, {"identity": self.identity})
        self.refresh()

    def once(self, name: str, check: Callable[[], object]) -> None:
        """Call `check`, unless it has passed before on this identity."""
        passed = self.folder / f"{name}.passed"
        if not passed.exists():
            check()
            passed.touch()

    @contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold a lock of the operating system, which ends with the process; yield False if another process has it."""
        lock = FileLock(self.folder / f"{name}.lock", timeout=-1 if wait else 0)
        held = False
        with suppress(Timeout):
            lock.acquire()
            held = True
        try:
            yield held
        finally:
            lock.release()

    def _open(self, path: Path) -> _Shard | None:
        """Map a shard; remove it, with a warning, if it is cut, unreadable or of another identity."""
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("identity") != self.identity:
                    raise ValueError("it was written for another model or setting")
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping
            return _Shard(path, parts["keys"], parts["values"], parts["exponents"], parts["checksums"].tolist())
        except (SafetensorError, KeyError, ValueError) as error:
            logger.warning("%s is damaged (%s); its texts are encoded again.", path, error)
            path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process has found the damage too
            pass
        return None


def _checksum(*parts: Tensor) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
