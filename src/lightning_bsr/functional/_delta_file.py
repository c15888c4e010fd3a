"""The file that holds what was trained: its format, how it is written, and what is checked when it is read."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_bsr._errors import ConfigurationError
from lightning_bsr._version import __version__

DELTA_FORMAT = "lightning_bsr.delta"
"""What the metadata of a delta file says under ``format``."""
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Delta:
    """What training changed of a module, and what it left alone.

    Attributes:
        tensors: The trained parameters and the persistent buffers, by their names in the state dict.
        base: What :func:`fingerprint` says of each frozen parameter, by name.
        configuration: How it was trained: plain values, as JSON has them. ``token_drop`` and ``rounded`` decide what
            the model computes; the rest tells a reader.
        package_version: Of lightning_bsr, which made it.
    """

    tensors: Mapping[str, torch.Tensor]
    base: Mapping[str, str]
    configuration: Mapping[str, Any] = field(default_factory=dict)
    package_version: str = __version__

    @property
    def base_sha256(self) -> str:
        """The hash of the frozen base: of the sorted names with their dtypes, shapes and the hashes of their bytes."""
        return _sha256_of(self.base)


def fingerprint(tensor: torch.Tensor) -> str:
    """Say dtype and shape of a tensor and the SHA-256 of its bytes, in row-major order.

    Args:
        tensor: Any dense tensor, on any device.

    Example:
        >>> fingerprint(torch.zeros(2, 3))[:26]
        'float32[2, 3]:9d908ecfb6b2'
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{describe(tensor)}:{hashlib.sha256(data.numpy().data).hexdigest()}"


def describe(tensor: torch.Tensor) -> str:
    """Say dtype and shape of a tensor, such as ``float32[2, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def write_delta(path: str | Path, delta: Delta) -> None:
    """Write a delta file: all of it, or nothing.

    Args:
        path: A file name that ends in ``.safetensors``; a file that is there is replaced at the last moment.
        delta: What it is to hold.

    Raises:
        ConfigurationError: If the name has another ending, or a tensor has NaN or infinite values.
        OSError: If it cannot be written; what was there before is there still.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigurationError(f"The delta file is to be '{path}', expected a name that ends in .safetensors.")
    if (name := non_finite(delta.tensors)) is not None:
        raise ConfigurationError(
            f"{name!r} has NaN or infinite values, so '{path}' was not written; train again from the last delta with "
            "a lower learning rate."
        )
    metadata = {
        "format": DELTA_FORMAT,
        "format_version": str(_FORMAT_VERSION),
        "package_version": delta.package_version,
        "base_sha256": delta.base_sha256,
        "base": _to_json(delta.base),
        "delta": _to_json({name: fingerprint(tensor) for name, tensor in delta.tensors.items()}),
        "configuration": _to_json(delta.configuration),
    }
    write_tensors(path, delta.tensors, {**metadata, "sha256": _sha256_of(metadata)})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, all of it or nothing; tensors that share memory are written one by one.

    Raises:
        OSError: If it cannot be written.
    """
    separate, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(separate, partial, metadata)
        partial.chmod(mode)  # safetensors makes files that only their owner may read


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to write in the same folder; at the end it takes the place of ``path``, at once.

    A process that is killed leaves the old file or the new one, and perhaps a file of the temporary name.

    Raises:
        OSError: If the file cannot be written; the message says what is still there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        kept = "the file of that name that was there before is untouched" if path.exists() else "nothing was left there"
        reason = error.strerror if isinstance(error, OSError) else None
        raise OSError(
            f"'{path}' could not be written ({reason or error}); {kept}. Free space or choose another folder, then "
            "resume from the last checkpoint."
        ) from error


def read_delta(path: str | Path) -> Delta:
    """Read a delta file and check it; no code that a file may hold is run.

    The checks find damage and mistakes. They do not prove who wrote the file, as whoever changes it can compute its
    hashes anew.

    Args:
        path: A file that :class:`lightning_bsr.DeltaCheckpoint` or :func:`save_delta` wrote.

    Returns:
        What it holds, on the CPU.

    Raises:
        ConfigurationError: If there is no such file, or it is truncated, changed, no delta, or of a newer format.

    Example:
        >>> import tempfile, timm
        >>> from lightning_bsr.functional import save_delta, select_blocks_
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> selection = select_blocks_(model, [5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_delta(model, f"{folder}/delta.safetensors")
        ...     delta = read_delta(f"{folder}/delta.safetensors")
        >>> len(delta.tensors), len(delta.base)
        (16, 64)
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"'{path}' does not exist, expected a delta file.")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            _check_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except SafetensorError as error:
        raise ConfigurationError(
            f"'{path}' cannot be read, expected a whole safetensors file: {error}; it may be truncated."
        ) from error
    written_sha256 = metadata.pop("sha256", "none")
    if (found := _sha256_of(metadata)) != written_sha256:
        raise ConfigurationError(
            f"The metadata of '{path}' was changed after it was written: its SHA-256 is {found}, expected "
            f"{written_sha256}."
        )
    delta = Delta(
        tensors, json.loads(metadata["base"]), json.loads(metadata["configuration"]), metadata["package_version"]
    )
    _check_tensors(path, tensors, json.loads(metadata["delta"]))
    return delta


def non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name the first tensor that has NaN or infinite values; ``None`` if there is none."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)


def some_of(names: Mapping[str, Any] | list[str], most: int = 3) -> str:
    """List the first few names."""
    listed = list(names)
    return ", ".join(map(repr, listed[:most])) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _check_format(path: str | Path, metadata: Mapping[str, str]) -> None:
    if (found := metadata.get("format")) != DELTA_FORMAT:
        raise ConfigurationError(f"'{path}' has the format {found!r} in its metadata, expected {DELTA_FORMAT!r}.")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > _FORMAT_VERSION:
        raise ConfigurationError(
            f"'{path}' has version {version!r} of the format and was written by lightning_bsr "
            f"{metadata.get('package_version')}, expected at most {_FORMAT_VERSION}, which lightning_bsr {__version__} "
            "reads; install a newer one."
        )


def _check_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], written: Mapping[str, str]) -> None:
    if missing := sorted(written.keys() - tensors):
        raise ConfigurationError(f"'{path}' lacks tensors that were written to it: {some_of(missing)}.")
    if extra := sorted(tensors.keys() - written):
        raise ConfigurationError(f"'{path}' holds tensors that were not written to it: {some_of(extra)}.")
    for name, expected in written.items():
        if (found := fingerprint(tensors[name])) != expected:
            raise ConfigurationError(
                f"{name!r} of '{path}' was changed after it was written: it is {found}, expected {expected}."
            )


def _to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _sha256_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_to_json(values).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Have the new name survive a power cut, where folders can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
