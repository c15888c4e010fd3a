"""Keeps the tokens that the first blocks of a ViT gave for each sample: in memory, or in a file."""

import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Protocol

import torch

from lightning_bsr._errors import ConfigurationError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "prefix.cache"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEAD = struct.Struct("<8s16s")  # what the file is, fingerprint
_RECORD = struct.Struct("<16sIIBBI")  # key, N, C, dtype of the tokens, dtype that they had, checksum of the tokens
_CHECK = struct.Struct("<I")  # checksum of what is before
_MAGIC = b"LBSRPFX1"

Row = tuple[torch.Tensor, torch.dtype]
"""Tokens ``[N, C]`` of one sample as they are kept, and the dtype that the blocks gave them."""


class TokenStore(Protocol):
    """What holds rows by their keys, up to so many bytes.

    Attributes:
        num_bytes: How many it holds now.
        max_bytes: How many it may hold.
    """

    num_bytes: int
    max_bytes: int

    def begin(self, fingerprint: bytes) -> None:
        """Hold rows of the blocks with this fingerprint of 16 bytes from now on; forget those of others."""

    def __contains__(self, key: bytes) -> bool: ...

    def get(self, key: bytes) -> Row | None:
        """Give the row of ``key``; ``None`` if there is none, or it is damaged."""

    def put(self, key: bytes, row: Row) -> bool:
        """Keep a row, and say whether there was room for it."""

    def close(self) -> None:
        """Let go of everything that is held open; a second call does nothing."""


class MemoryStore:
    """Keeps rows in the memory of the process.

    A copy, such as one of a module that has a cache, is empty and has no room.

    Args:
        max_bytes: How many bytes of tokens to keep at most.

    Example:
        >>> store = MemoryStore(max_bytes=64)
        >>> store.begin(b"a" * 16)
        >>> store.put(b"1" * 16, (torch.ones(2, 4), torch.float32))
        True
        >>> store.put(b"2" * 16, (torch.ones(9, 4), torch.float32))
        False
        >>> store.num_bytes
        32
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.close()

    def begin(self, fingerprint: bytes) -> None:
        """See :class:`TokenStore`."""
        self.close()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def get(self, key: bytes) -> Row | None:
        """See :class:`TokenStore`."""
        return self._rows.get(key)

    def put(self, key: bytes, row: Row) -> bool:
        """See :class:`TokenStore`."""
        if key in self._rows:
            return True
        if self.num_bytes + row[0].nbytes > self.max_bytes:
            return False
        self._rows[key] = row
        self.num_bytes += row[0].nbytes
        return True

    def close(self) -> None:
        """See :class:`TokenStore`."""
        self._rows: dict[bytes, Row] = {}
        self.num_bytes = 0

    def __reduce__(self) -> tuple[type["MemoryStore"], tuple[int]]:
        return MemoryStore, (0,)


class FileStore:
    """Keeps rows in a file, which the next process may go on with, and reads them through a memory map.

    The file begins with the fingerprint; then come records, each with a checksum (CRC-32) of its head and one of its
    tokens. A record that was cut off or damaged is never given out, and is written anew when it is put again. A file
    with another fingerprint is started anew. One process at a time may use it; where the system has no ``flock``, that
    is not checked.

    A copy, such as one of a module that has a cache, is an empty :class:`MemoryStore` without room.

    Args:
        folder: Where the file ``prefix.cache`` is or will be.
        max_bytes: How many bytes the file may have.

    Raises:
        ConfigurationError: If the file cannot be opened, or another process uses it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._file = self.path.open("r+b", buffering=0)
        except OSError as error:
            raise ConfigurationError(
                f"place is {str(folder)!r}, expected 'memory' or a folder that can be written: {error}."
            ) from error
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise ConfigurationError(
                    f"{str(self.path)!r} is in use by another prefix cache; give each its own folder."
                ) from error
        self._map: mmap.mmap | None = None
        self._offsets: dict[bytes, int] = {}
        self._damaged: dict[bytes, int] = {}
        self.num_bytes = 0

    def begin(self, fingerprint: bytes) -> None:
        """See :class:`TokenStore`."""
        self._close_map()
        self._offsets, self._damaged = {}, {}
        head = _HEAD.pack(_MAGIC, fingerprint)
        self._file.seek(0)
        if self._file.read(len(head)) != head:
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(head)
        self.num_bytes = self._read_offsets(_HEAD.size)
        # What a process wrote when it was killed, and what is behind damage.
        self._file.truncate(self.num_bytes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._offsets

    def get(self, key: bytes) -> Row | None:
        """See :class:`TokenStore`."""
        offset = self._offsets.get(key)
        if offset is None:
            return None
        row = self._read(key, offset)
        if row is None:
            self._damaged[key] = self._offsets.pop(key)
        return row

    def put(self, key: bytes, row: Row) -> bool:
        """See :class:`TokenStore`."""
        if key in self._offsets:
            return True
        tokens, dtype = row
        data = tokens.contiguous().view(torch.uint8).numpy().tobytes()
        codes = DTYPES.index(tokens.dtype), DTYPES.index(dtype)
        head = _RECORD.pack(key, *tokens.shape, *codes, zlib.crc32(data))
        record = head + _CHECK.pack(zlib.crc32(head)) + data
        offset = self._damaged.pop(key, self.num_bytes)
        end = max(self.num_bytes, offset + len(record))
        if end > self.max_bytes:
            return False
        try:
            self._file.seek(offset)
            complete = self._file.write(record) == len(record)
        except OSError:
            complete = False
        if not complete:  # the disk is full; what was written in part has a wrong checksum
            return False
        self._offsets[key] = offset
        self.num_bytes = end
        return True

    def close(self) -> None:
        """See :class:`TokenStore`."""
        self._close_map()
        self._file.close()

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[int]]:
        return MemoryStore, (0,)

    def _read_offsets(self, offset: int) -> int:
        """Note where each record begins, and return where the last good one ends."""
        size = min(os.fstat(self._file.fileno()).st_size, self.max_bytes)
        while True:
            self._file.seek(offset)
            head = self._file.read(_RECORD.size + _CHECK.size)
            length = _length(head)
            if length is None or offset + len(head) + length > size:
                return offset
            self._offsets[head[:16]] = offset
            offset += len(head) + length

    def _read(self, key: bytes, offset: int) -> Row | None:
        start = offset + _RECORD.size + _CHECK.size
        size = os.fstat(self._file.fileno()).st_size
        if size < start:
            return None
        # Reading a map behind the end of its file would end the process.
        if self._map is None or len(self._map) != size:
            self._close_map()
            self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
        head = self._map[offset:start]
        length = _length(head)
        if length is None or head[:16] != key or start + length > size:
            return None
        _, num_tokens, channels, code, output_code, checksum = _RECORD.unpack(head[: _RECORD.size])
        data = bytearray(length)
        data[:] = self._map[start : start + length]
        if zlib.crc32(data) != checksum:
            return None
        tokens = torch.frombuffer(data, dtype=DTYPES[code]).view(num_tokens, channels)
        return tokens, DTYPES[output_code]

    def _close_map(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


def _length(head: bytes) -> int | None:
    """The bytes of the tokens behind a record's head; ``None`` if it is cut off or damaged."""
    if len(head) < _RECORD.size + _CHECK.size:
        return None
    record, check = head[: _RECORD.size], head[_RECORD.size :]
    if _CHECK.unpack(check)[0] != zlib.crc32(record):
        return None
    _, num_tokens, channels, code, _, _ = _RECORD.unpack(record)
    return int(num_tokens * channels * DTYPES[code].itemsize)
