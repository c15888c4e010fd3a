"""Writes a model to a file, runs the file, and compares."""

import copy
import inspect
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.export._formats import FORMATS, Format, Run, check_format, tensors_of
from lightning_bsr.export._ties import token_drops, watched_margins

Inputs = Tensor | tuple[Tensor, ...]

_NEAR_TIE = 1e-4  # of a score; some hundred times the rounding of its softmax


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares.

    Attributes:
        path: The file.
        format: Its format.
        num_bytes: Its size.
        input_shapes: The shapes that it takes, and no others.
        max_difference: The largest difference of any value from what the module gives, over the pictures compared.
        num_compared: Pictures that were compared.
        num_near_ties: Pictures that were not, as two tokens, of which one is kept, have scores so close that rounding
            may decide.
    """

    path: Path
    format: Format
    num_bytes: int
    input_shapes: tuple[tuple[int, ...], ...]
    max_difference: float
    num_compared: int
    num_near_ties: int

    def __str__(self) -> str:
        shapes = ", ".join(str(list(shape)) for shape in self.input_shapes)
        ties = f"; {self.num_near_ties} with nearly equal scores were left out" if self.num_near_ties else ""
        return (
            f"{self.path}, {self.num_bytes / 1e6:.1f} MB, takes {shapes}; differs from the module by at most "
            f"{self.max_difference:.1e} on {self.num_compared} pictures{ties}"
        )


def export_model(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | Path,
    format: Format | None = None,
    *,
    check: Sequence[Inputs] = (),
    tolerance: float = 1e-4,
    overwrite: bool = False,
) -> Exported:
    """Write a model for inference, with the tokens that it drops, and check the file against the model.

    The model is exported in eval mode, in float32 and for the CPU; it is not changed. All shapes are constants, the
    batch's and the numbers of tokens after each drop among them. The file is loaded again and run on ``example_inputs``
    and ``check``; if it computes something else, there is no file. Linear layers that hold 8-bit integers
    (:func:`lightning_bsr.functional.quantize_frozen_`) hold them in the file too.

    Two tokens of nearly the same score, one of which is kept, may be exchanged by the rounding of another library; the
    outputs then differ by more than rounding, and neither is wrong. Such pictures are counted and not compared.

    Args:
        model: Any module; where it drops tokens, so does the file.
        example_inputs: What its forward takes, of the shapes that the file shall take: images ``[B, 3, H, W]``, or a
            tuple of tensors. Give real pictures.
        path: Where to write: ``.onnx``, ``.pt2`` or ``.pte``. It appears when all is well, or not at all.
        format: ``"onnx"``, ``"pt2"`` (``torch.export``) or ``"executorch"``; by default as ``path`` ends.
        check: More inputs of the same shapes to compare on.
        tolerance: The largest difference of any value that is accepted.
        overwrite: Whether a file that exists may be replaced.

    Returns:
        What was written and measured.

    Raises:
        ConfigurationError: If an argument is wrong, a package is missing, the model has what the format cannot hold, or
            the outputs differ.

    Example:
        >>> import tempfile, timm
        >>> from lightning_bsr.functional import install_token_drop
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> handle = install_token_drop(model, [1, 3], 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export_model(model, torch.rand(4, 3, 160, 160), f"{folder}/model.pt2")
        >>> exported.input_shapes, exported.max_difference < 1e-6
        (((4, 3, 160, 160),), True)
    """
    path = Path(path)
    format = check_format(path, format)
    check_path(path, overwrite=overwrite)
    batches = [_float_cpu(inputs) for inputs in (example_inputs, *check)]
    shapes = _check_inputs(model, batches)
    model = copy.deepcopy(model).eval().float().cpu().requires_grad_(False)
    program = _trace(model, batches[0])
    # In a folder of its own, as the suffix of a file's name matters to those who write it.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        FORMATS[format].write(program, written)
        difference, compared, ties = _compare(model, FORMATS[format].load(written), batches)
        if not difference <= tolerance:
            raise ConfigurationError(
                f"The exported model differs from the module by {difference:.1e} on {compared} pictures, expected at "
                f"most {tolerance:g}; '{path}' is not written."
            )
        num_bytes = written.stat().st_size
        written.replace(path)
    return Exported(path, format, num_bytes, shapes, difference, compared, ties)


def check_path(path: Path, *, overwrite: bool, by: str = "overwrite=True") -> None:
    """Refuse to write where that is impossible or would replace something.

    Args:
        path: Where to write.
        overwrite: Whether a file that exists may be replaced.
        by: What makes that so.

    Raises:
        ConfigurationError: The file exists, or its folder does not.
    """
    if path.exists() and not overwrite:
        raise ConfigurationError(f"The file is '{path}', which exists already; with {by} it is replaced.")
    if path.is_dir():
        raise ConfigurationError(f"The file is '{path}', which is a folder.")
    if not path.parent.is_dir():
        raise ConfigurationError(f"The file is '{path}', but there is no folder '{path.parent}'; make it first.")


def _float_cpu(inputs: Inputs) -> tuple[Tensor, ...]:
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    return tuple(t.detach().cpu().float() if t.is_floating_point() else t.detach().cpu() for t in tensors)


def _check_inputs(model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> tuple[tuple[int, ...], ...]:
    shapes = [tuple(tuple(each.shape) for each in batch) for batch in batches]
    if len(set(shapes)) > 1:
        other = next(shape for shape in shapes if shape != shapes[0])
        raise ConfigurationError(f"check has inputs of the shapes {other}, expected {shapes[0]} as in example_inputs.")
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*batches[0])
    except TypeError as error:
        raise ConfigurationError(
            f"The forward of {type(model).__name__} takes {signature}, but example_inputs has {len(batches[0])} "
            "tensors; export a module that takes these and gives the others itself."
        ) from error
    if any(drop.score == "random" for drop in token_drops(model)):
        raise ConfigurationError(
            "The model drops tokens with score='random', a control that gives something else each time; export it "
            "with score='cls' or 'mean'."
        )
    return shapes[0]


def _trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    # Zeros, as a .pt2 file holds the inputs, and pictures may be private.
    blank = tuple(torch.zeros_like(each) for each in inputs)
    with torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(model, blank, strict=False)
    for node in program.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace == "lightning_bsr":
            raise ConfigurationError(
                f"{type(model).__name__} has mixtures of experts, whose experts take as many tokens as a picture sends "
                "them; such shapes cannot be exported as constants."
            )
    return program


def _compare(model: nn.Module, run: Run, batches: Sequence[tuple[Tensor, ...]]) -> tuple[float, int, int]:
    """Give the largest difference, how many pictures it is over, and how many were left out."""
    differences, margins = [], []
    for inputs in batches:
        size = len(inputs[0])
        with torch.no_grad(), watched_margins(model) as watched:
            expected = tensors_of(model(*inputs))
        found = run(*inputs)
        if [each.shape for each in found] != [each.shape for each in expected]:
            raise ConfigurationError(
                f"The exported model gives tensors of the shapes {[tuple(each.shape) for each in found]}, the module "
                f"{[tuple(each.shape) for each in expected]}."
            )
        pairs = zip(found, expected, strict=True)
        apart = torch.stack([(one - other).abs().reshape(size, -1).amax(dim=1) for one, other in pairs])
        differences.append(apart.amax(dim=0))
        margins.append(torch.stack([torch.full((size,), math.inf), *watched]).amin(dim=0))
    clear = torch.cat(margins) > _NEAR_TIE
    num_clear = int(clear.sum())
    if not num_clear:
        raise ConfigurationError(
            f"In all {len(clear)} pictures a kept and a dropped token have nearly the same score, so nothing can be "
            "compared; give real pictures, which are not of one colour."
        )
    return float(torch.cat(differences)[clear].max()), num_clear, len(clear) - num_clear
