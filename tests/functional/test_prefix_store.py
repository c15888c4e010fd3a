import pickle

import pytest
import torch

from lightning_bsr import ConfigurationError
from lightning_bsr.functional._prefix_key import hash_samples, hash_tensor
from lightning_bsr.functional._prefix_store import FILE_NAME, FileStore, MemoryStore

X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
MINE, OTHER = b"m" * 16, b"o" * 16
KEYS = [bytes([i]) * 16 for i in range(4)]
ROWS = [(torch.randn(3, 4), torch.float32) for _ in KEYS]
HEAD, RECORD = 24, 16 + 4 + 4 + 1 + 1 + 4 + 4 + 3 * 4 * 4


def filled(folder, fingerprint=MINE, max_bytes=2**20):
    store = FileStore(folder, max_bytes)
    store.begin(fingerprint)
    for key, row in zip(KEYS, ROWS, strict=True):
        store.put(key, row)
    return store


def reopened(folder, fingerprint=MINE, max_bytes=2**20):
    store = FileStore(folder, max_bytes)
    store.begin(fingerprint)
    return store


def readable(store):
    """Which rows the store gives out; they are the right ones."""
    found = [store.get(key) for key in KEYS]
    for row, right in zip(found, ROWS, strict=True):
        assert row is None or (torch.equal(row[0], right[0]) and row[1] == right[1])
    return [row is not None for row in found]


def test_file_store__a_later_one_goes_on(tmp_path):
    filled(tmp_path).close()
    store = reopened(tmp_path)
    assert readable(store) == [True] * 4
    assert store.num_bytes == HEAD + 4 * RECORD == (tmp_path / FILE_NAME).stat().st_size
    store.close()
    store.close()


def test_file_store__forgets_another_fingerprint(tmp_path):
    filled(tmp_path).close()
    store = reopened(tmp_path, OTHER)
    assert readable(store) == [False] * 4
    assert (tmp_path / FILE_NAME).stat().st_size == HEAD
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_file_store__keeps_dtypes(dtype, tmp_path):
    store = reopened(tmp_path)
    row = torch.randn(3, 4).to(dtype)
    store.put(KEYS[0], (row, torch.float64))
    tokens, output_dtype = store.get(KEYS[0])
    assert tokens.dtype == dtype
    assert torch.equal(tokens, row)
    assert output_dtype == torch.float64
    store.close()


@pytest.mark.parametrize("cut", [1, RECORD - 1, RECORD, RECORD + 40])
def test_file_store__cut_off_before_opening(cut, tmp_path):
    filled(tmp_path).close()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    store = reopened(tmp_path)
    left = 3 if cut <= RECORD else 2
    assert readable(store) == [True] * left + [False] * (4 - left)
    assert store.num_bytes == path.stat().st_size == HEAD + left * RECORD
    assert all(store.put(key, row) for key, row in zip(KEYS, ROWS, strict=True))
    assert readable(store) == [True] * 4
    store.close()


def test_file_store__cut_off_while_open(tmp_path):
    store = filled(tmp_path)
    assert readable(store) == [True] * 4  # mapped now
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.truncate(HEAD + RECORD + 10)
    assert readable(store) == [True, False, False, False]
    store.put(KEYS[3], ROWS[3])  # leaves a hole before it
    assert readable(store) == [True, False, False, True]
    store.put(KEYS[1], ROWS[1])
    store.put(KEYS[2], ROWS[2])
    assert readable(store) == [True] * 4
    store.close()
    store = reopened(tmp_path)
    assert readable(store) == [True] * 4
    store.close()


@pytest.mark.parametrize("opened", [True, False], ids=["while_open", "before_opening"])
@pytest.mark.parametrize("byte", range(RECORD))
def test_file_store__any_damaged_byte_is_noticed(byte, opened, tmp_path):
    store = filled(tmp_path)
    readable(store)
    if not opened:
        store.close()
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.seek(HEAD + RECORD + byte)
        (value,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([value ^ 4]))
    if not opened:
        store = reopened(tmp_path)
    # What is behind a damaged head cannot be found by a later process.
    found_behind = opened or byte >= RECORD - 48
    assert readable(store) == [True, False, found_behind, found_behind]
    assert all(store.put(key, row) for key, row in zip(KEYS, ROWS, strict=True))
    assert readable(store) == [True] * 4
    assert store.num_bytes == HEAD + 4 * RECORD
    store.close()


@pytest.mark.parametrize("content", [b"", b"something else", b"x" * 1000])
def test_file_store__another_file_is_started_anew(content, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(content)
    store = filled(tmp_path)
    assert readable(store) == [True] * 4
    store.close()


def test_file_store__bound(tmp_path):
    store = filled(tmp_path, max_bytes=HEAD + 2 * RECORD + 5)
    assert readable(store) == [True, True, False, False]
    assert (tmp_path / FILE_NAME).stat().st_size == HEAD + 2 * RECORD
    store.close()
    store = reopened(tmp_path, max_bytes=HEAD + RECORD)
    assert readable(store) == [True, False, False, False]
    assert (tmp_path / FILE_NAME).stat().st_size == HEAD + RECORD
    store.close()


def test_file_store__a_full_disk_is_like_a_bound(tmp_path):
    store = filled(tmp_path)

    class Full:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, data):
            file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    file, store._file = store._file, Full()
    assert not store.put(OTHER, ROWS[0])
    store._file = file
    assert OTHER not in store
    assert readable(store) == [True] * 4
    store.close()
    store = reopened(tmp_path)
    assert store.num_bytes == HEAD + 4 * RECORD
    assert store.put(OTHER, ROWS[0])
    store.close()


def test_file_store__one_user_at_a_time(tmp_path):
    store = filled(tmp_path)
    with pytest.raises(ConfigurationError) as error:
        FileStore(tmp_path, 2**20)
    assert str(error.value) == (
        f"{str(tmp_path / FILE_NAME)!r} is in use by another prefix cache; give each its own folder."
    )
    store.close()
    FileStore(tmp_path, 2**20).close()


def test_file_store__checks_the_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError) as error:
        FileStore(file, 2**20)
    assert str(error.value) == (
        f"place is {str(file)!r}, expected 'memory' or a folder that can be written: [Errno 17] File exists: "
        f"{str(file)!r}."
    )


@pytest.mark.parametrize("make", [lambda folder: MemoryStore(2**20), filled], ids=["memory", "file"])
def test_stores__copies_are_empty_and_have_no_room(make, tmp_path):
    store = make(tmp_path)
    twin = pickle.loads(pickle.dumps(store))
    twin.begin(MINE)
    assert not twin.put(KEYS[0], ROWS[0])
    assert readable(twin) == [False] * 4
    store.close()


def test_hash_samples__is_of_the_bytes_alone():
    hashes = hash_samples(X)
    assert len(set(hashes)) == 8
    assert hash_samples(X.flip(0)) == hashes[::-1]
    assert hash_samples(X[3:5]) == hashes[3:5]
    assert hash_samples(X.transpose(2, 3).contiguous().transpose(2, 3)) == hashes
    assert set(hash_samples(X + 1)).isdisjoint(hashes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 8, 17])
def test_hash_samples__sees_any_bit(dtype, size):
    x = torch.zeros(1 + size, size, dtype=dtype)
    rows = x.view(torch.uint8)
    for index in range(size):
        rows[1 + index, index * x.element_size()] = 128
    assert len(set(hash_samples(x))) == 1 + size
    assert hash_samples(x[1:]) == hash_samples(x)[1:]  # not aligned


def test_hash_samples__of_signs_alone():
    x = torch.ones(64, 256)
    for row in range(1, 64):
        x[row, torch.randperm(256)[:2]] *= -1
    assert len(set(hash_samples(x))) == len({row.numpy().tobytes() for row in x})


def test_hash_tensor__sees_shape_dtype_and_order():
    tensors = [
        torch.zeros(()), torch.zeros(1), torch.zeros(0), torch.zeros(2), torch.zeros(1, 2), torch.zeros(1).double(),
        torch.arange(40_000.0), torch.arange(40_000.0).roll(2**14), torch.arange(40_000.0).roll(1),
    ]  # fmt: skip
    assert len({hash_tensor(tensor) for tensor in tensors}) == len(tensors)
