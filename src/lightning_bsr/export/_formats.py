"""The files that a model can be exported to: how each is written, and how it is run."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from lightning_bsr._errors import ConfigurationError

Format = Literal["onnx", "pt2", "executorch"]
Run = Callable[..., list[Tensor]]
"""From the inputs to the tensors in the output."""

MAX_ONNX_BYTES = 2**31 - 2**24
"""Of weights in one ONNX file: protobuf admits 2 GiB, a little of which goes to the graph."""

_OPSET = 18  # the lowest that torch writes without converting, for the oldest runtimes
_aten = torch.ops.aten


def _as_topk(x: Tensor, *, dim: int = -1, descending: bool = False, **_: Any) -> tuple[Tensor, Tensor]:
    return _aten.topk.default(x, x.shape[dim], dim, descending, True)  # type: ignore[no-any-return]  # torch's


# Neither ONNX nor ExecuTorch has a stable sort. Where scores are equal, ONNX's TopK takes the lower index first, which
# is what stable means.
_SORTS: dict[Any, Callable[..., Any]] = {
    _aten.sort.stable: _as_topk,
    _aten.argsort.stable: lambda x, **kwargs: _as_topk(x, **kwargs)[1],
    _aten.argsort.default: lambda x, dim=-1, descending=False: _as_topk(x, dim=dim, descending=descending)[1],
}


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _load_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda *inputs: tensors_of(module(*inputs))


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    held = sum(t.nbytes for t in (*program.state_dict.values(), *program.constants.values()) if torch.is_tensor(t))
    if held > MAX_ONNX_BYTES:
        raise ConfigurationError(
            f"format is 'onnx', but the weights take {held / 2**30:.2f} GiB and such a file holds at most 2; use 'pt2'."
        )
    names = list(program.graph_signature.user_inputs)
    written = torch.onnx.export(
        program.run_decompositions(_SORTS),
        dynamo=True,
        verbose=False,
        opset_version=_OPSET,
        optimize=True,
        input_names=["images", *names[1:]] if len(names) == 1 else None,
    )
    assert written is not None
    for node in written.model.graph:
        node.metadata_props.clear()  # lines of source, with the paths of this machine
    written.save(path, external_data=False)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, feed)]

    return run


def _write_executorch(program: ExportedProgram, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program.run_decompositions(_SORTS), partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)


def _load_executorch(path: Path) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda *inputs: tensors_of(method.execute(inputs))


@dataclass(frozen=True)
class FileFormat:
    """One kind of file.

    Attributes:
        suffix: What its files' names end in.
        packages: What must be installed to write and run it.
        install: What pip is to be given.
        write: Writes a program to a path.
        load: Gives the function that a file computes.
    """

    suffix: str
    packages: tuple[str, ...]
    install: str
    write: Callable[[ExportedProgram, Path], None]
    load: Callable[[Path], Run]


FORMATS: dict[Format, FileFormat] = {
    "onnx": FileFormat(
        ".onnx", ("onnx", "onnxscript", "onnxruntime"), "lightning-bsr[export]", _write_onnx, _load_onnx
    ),
    "pt2": FileFormat(".pt2", (), "", _write_pt2, _load_pt2),
    "executorch": FileFormat(".pte", ("executorch",), "lightning-bsr[executorch]", _write_executorch, _load_executorch),
}


def check_format(path: Path, format: Format | None) -> Format:
    """Say which format is meant, and that it can be written.

    Args:
        path: Where the file shall be.
        format: The format; ``None`` means the one that the file's name stands for.

    Raises:
        ConfigurationError: If there is no such format, the name does not go with it, or a package is missing.
    """
    listed = ", ".join(f"{name!r} ({each.suffix})" for name, each in FORMATS.items())
    if format is not None and format not in FORMATS:
        raise ConfigurationError(f"format is {format!r}, expected one of {listed}.")
    chosen = format or next((name for name, each in FORMATS.items() if each.suffix == path.suffix), None)
    if chosen is None or FORMATS[chosen].suffix != path.suffix:
        given = "" if format is None else f" with format {format!r}"
        raise ConfigurationError(f"The file is '{path}'{given}, expected a name that goes with one of {listed}.")
    missing = [name for name in FORMATS[chosen].packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"format is {chosen!r}, for which {', '.join(missing)} is not installed: "
            f"pip install '{FORMATS[chosen].install}'"
        )
    return chosen


def tensors_of(output: Any) -> list[Tensor]:
    """List the tensors in what a model gives: one, or a tuple, mapping or output of transformers with several."""
    leaves: Sequence[Any] = tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
