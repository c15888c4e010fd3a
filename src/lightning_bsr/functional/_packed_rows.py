"""The forms in which a tensor waits for backward: as 8-bit integers, as its largest values only, or as it is."""

from typing import Protocol

import torch


class Rows(Protocol):
    """A tensor in its packed form."""

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        """What is in memory."""

    def restore(self) -> torch.Tensor:
        """Make a tensor of the original shape, contiguous."""


class Int8Rows:
    """Floats ``[..., D]`` as 8-bit integers between the smallest and the largest value of each row.

    Example:
        >>> rows = Int8Rows(torch.tensor([[-1.0, 0.0, 1.55]]))
        >>> rows.codes, rows.restore()
        (tensor([[  0, 100, 255]], dtype=torch.uint8), tensor([[-1.0000,  0.0000,  1.5500]]))
    """

    def __init__(self, x: torch.Tensor) -> None:
        # Both ends are values of x, so they are exact in its own dtype, which a scale would not be.
        self.low, self.high = torch.aminmax(x, dim=-1, keepdim=True)
        low, scale = self._low_and_scale()
        self.codes = torch.sub(x, low).div_(scale).round_().clamp_(0, 255).to(torch.uint8)

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.low, self.high

    def restore(self) -> torch.Tensor:
        low, scale = self._low_and_scale()
        return self.codes.to(torch.float32).mul_(scale).add_(low).to(self.low.dtype)

    def _low_and_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        low = self.low.float()
        # Clamped for rows of equal values.
        return low, ((self.high.float() - low) / 255).clamp_(min=torch.finfo(torch.float32).tiny)


class SparseRows:
    """The ``k`` values of each row of floats ``[..., D]`` that are largest by magnitude, and where they stood.

    Example:
        >>> SparseRows(torch.tensor([[-3.0, 0.5, 1.0, 2.0]]), k=2).restore()
        tensor([[-3.,  0.,  0.,  2.]])
    """

    def __init__(self, x: torch.Tensor, k: int) -> None:
        self.shape = x.shape
        index = x.abs().topk(k, dim=-1, sorted=False).indices
        self.values = x.gather(-1, index)
        self.index = index.to(torch.int16 if x.shape[-1] <= torch.iinfo(torch.int16).max else torch.int32)

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        return self.values, self.index

    def restore(self) -> torch.Tensor:
        zeros = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        return zeros.scatter_(-1, self.index.long(), self.values)


class Exact:
    """A tensor left as it is."""

    def __init__(self, x: torch.Tensor) -> None:
        # The tensor itself may be the result of the operation that saves it: a cycle that would outlive its graph.
        self.tensor = x.detach()
        self._version = x._version

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        return (self.tensor,)

    def restore(self) -> torch.Tensor:
        # Autograd checks this itself, but not where hooks stand between.
        if self.tensor._version != self._version:
            raise RuntimeError(
                f"A tensor of shape {list(self.tensor.shape)} that backward needs was changed by an in-place "
                "operation after the forward pass."
            )
        return self.tensor
