"""Finds the largest batch that fits."""

from collections.abc import Callable

from lightning_bsr.memory._report import MemoryReport


def largest_batch_size(plan_at: Callable[[int], MemoryReport], budget: int, *, at_most: int = 2**16) -> int:
    """Find the largest batch whose step, as planned, needs at most ``budget`` bytes at its peak.

    A step's peak grows with the batch, nearly in proportion: a straight line through two plans guesses, further plans
    prove that the answer fits and that one image more does not.

    Args:
        plan_at: Plans the step for a batch size, such as ``lambda b: plan(model, (1, 3, 224, 224), batch_size=b)``.
        budget: Bytes.
        at_most: Look no further than this.

    Returns:
        The batch size; 0 if not even one image fits.

    Example:
        >>> import timm
        >>> from lightning_bsr.memory import plan
        >>> model = timm.create_model("test_vit", num_classes=10)
        >>> largest_batch_size(lambda b: plan(model, (b, 3, 160, 160)), 256 * 2**20)
        102
    """
    peaks: dict[int, int] = {}

    def fits(size: int) -> bool:
        if size not in peaks:
            peaks[size] = plan_at(size).peak or 0
        return peaks[size] <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= at_most and fits(high):
        growth = (peaks[high] - peaks[low]) / (high - low)
        # Small batches may all have the peak of the optimizer's step.
        guess = high + round((budget - peaks[high]) / growth) if growth > 0 else 2 * high
        low, high = high, min(max(high + 1, guess), at_most + 1)
    # low fits; high does not, or is beyond the bound.
    straight = True
    while high - low > 1:
        width = high - low
        middle = (low + high) // 2
        if straight and high in peaks:
            guess = low + int((budget - peaks[low]) * width / (peaks[high] - peaks[low]))
            middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if fits(middle) else (low, middle)
        # Where the line guesses badly, the next step halves.
        straight = 2 * (high - low) <= width or not straight
    return low
