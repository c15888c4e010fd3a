"""Names what the output of a ViT's first blocks depends on: each sample's tokens, and the blocks themselves."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_bsr.functional._forward import BlockForward, forward_chain
from lightning_bsr.functional._prefix_given import Given

_WORD = 8  # bytes
_CHUNK = 2**16  # bytes
_LANES = 2


def hash_samples(x: torch.Tensor) -> list[bytes]:
    """Hash the bytes of each sample of a batch to 32 bytes, on the device where they lie.

    Each 64-bit word is multiplied by a fixed random factor of its own and the products are added, modulo 2**64; twice
    on the words as they are, and twice with their halves exchanged, because a product's low bits know little of the
    high ones. Integer sums do not depend on their order, so neither does the hash on the device. Two different samples
    have the same hash with a probability of 2**-66 at most, and of 2**-250 unless they differ in sign bits alone. It is
    no protection against somebody who looks for such samples.

    Args:
        x: A batch ``[B, ...]`` of any dtype.

    Returns:
        One hash a sample.

    Example:
        >>> a, b, c = hash_samples(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]))
        >>> a == b, a == c, len(a)
        (False, True, 32)
    """
    data = x.detach().flatten(1).contiguous().view(torch.uint8)
    # Padding copies, so that the words are aligned.
    words = F.pad(data, (0, -data.shape[1] % _WORD)).view(torch.int64)
    exchanged = words.view(torch.int32).unflatten(1, (-1, 2)).flip(2).flatten(1).view(torch.int64)
    factors = _factors(words.shape[1], x.device)
    sums = [(w * f).sum(1) for w, fs in zip((words, exchanged), factors, strict=True) for f in fs]
    return [row.tobytes() for row in torch.stack(sums, 1).cpu().numpy()]


@functools.lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        bounds = torch.iinfo(torch.int64)
        factors = torch.randint(bounds.min, bounds.max, (2, _LANES, count), generator=generator)
        return factors.to(device)


def hash_tensor(tensor: torch.Tensor) -> bytes:
    """Hash a tensor's dtype, shape and bytes to 16 bytes, on the device where it lies.

    Example:
        >>> row, same, column = torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 1)
        >>> hash_tensor(row) == hash_tensor(same), hash_tensor(row) == hash_tensor(column)
        (True, False)
    """
    digest = hashlib.blake2b(repr((tensor.dtype, tuple(tensor.shape))).encode(), digest_size=16)
    data = tensor.detach().reshape(1, -1).contiguous().view(torch.uint8)
    chunks = F.pad(data, (0, -data.shape[1] % _CHUNK)).view(-1, _CHUNK)
    digest.update(b"".join(hash_samples(chunks)))
    return digest.digest()


def key_samples(x: torch.Tensor, blocks: Sequence[nn.Module], given: Iterable[Given]) -> list[bytes]:
    """Name what ``blocks`` make of each sample of a batch, given that they stay what they are.

    Kernels may take another way for another batch size, so a sample in a batch of another size has another name.

    Args:
        x: Tokens ``[B, N, C]``, the input of the first block.
        blocks: The blocks.
        given: What the first block is given beside ``x``, the same for all samples. Tensors count with all that lies in
            their storages, as later blocks may be given another part of it.

    Returns:
        One key of 16 bytes a sample.
    """
    kind = x.device.type
    circumstances = (
        tuple(x.shape),
        x.dtype,
        torch.is_grad_enabled(),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        [block.training for block in blocks],
        [_describe(one) if isinstance(one, torch.Tensor) else one for one in given],
    )
    context = hashlib.blake2b(repr(circumstances).encode(), digest_size=32).digest()
    return [hashlib.blake2b(sample, digest_size=16, key=context).digest() for sample in hash_samples(x)]


def _describe(tensor: torch.Tensor) -> tuple[Any, ...]:
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), hash_tensor(whole)


def signature(blocks: Iterable[nn.Module], ignored: type[BlockForward]) -> tuple[Any, ...]:
    """Give what changes if somebody changes the blocks' weights in place, replaces them, or wraps the blocks.

    Comparing two of these takes microseconds. A change through ``.data`` does not show; :func:`fingerprint` sees it.
    """
    tensors = [t for block in blocks for t in (*block.parameters(), *block.buffers())]
    return (
        [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors],
        [_forwards(block, ignored) for block in blocks],
    )


def fingerprint(blocks: Iterable[nn.Module], ignored: type[BlockForward], device: torch.device) -> bytes:
    """Hash all that the function of ``blocks`` consists of to 16 bytes.

    That is the bytes of their parameters and buffers, the classes and plain settings of their modules, what is around
    their forwards, the device, and what decides by which kernels it computes.

    Args:
        blocks: The blocks.
        ignored: Forwards around the blocks that do not count.
        device: Where the blocks compute.
    """
    digest = hashlib.blake2b(repr(_environment(device)).encode(), digest_size=16)
    for block in blocks:
        modules = [(name, _class(module), _settings(module)) for name, module in block.named_modules()]
        digest.update(repr((modules, _forwards(block, ignored))).encode())
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            digest.update(name.encode() + hash_tensor(tensor))
    return digest.digest()


def _environment(device: torch.device) -> tuple[Any, ...]:
    accelerator = torch.get_device_module(device)
    name = accelerator.get_device_name(device) if hasattr(accelerator, "get_device_name") else None
    return (
        version("lightning-bsr"),
        torch.__version__,
        device.type,
        name,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


def _forwards(block: nn.Module, ignored: type[BlockForward]) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(_class(f), _settings(f)) for f in forward_chain(block) if not isinstance(f, ignored)]


def _class(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _settings(thing: object) -> list[tuple[str, str]]:
    """The attributes of a module or forward that are plain values or functions, for their names are stable."""
    public = ((name, value) for name, value in vars(thing).items() if not name.startswith("_") and name != "training")
    return sorted((name, text) for name, value in public if (text := _text(value)) is not None)


def _text(value: object) -> str | None:
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    plain = (bool, int, float, str, type(None), torch.dtype)
    items = value if isinstance(value, tuple) else (value,)
    return repr(value) if all(isinstance(item, plain) for item in items) else None
