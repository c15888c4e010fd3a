"""Which class defines what a module computes, and its name."""

from torch import nn


def full_name(cls: type) -> str:
    """Name a class with its module.

    Example:
        >>> full_name(nn.MultiheadAttention)
        'torch.nn.modules.activation.MultiheadAttention'
    """
    return f"{cls.__module__}.{cls.__qualname__}"


def defines_forward(module: nn.Module) -> type[nn.Module]:
    """Return the class that defines the forward of ``module``.

    Example:
        >>> class Mine(nn.Linear):
        ...     pass
        >>> defines_forward(Mine(2, 2)).__name__
        'Linear'
    """
    for cls in type(module).__mro__:
        forward = vars(cls).get("forward")
        # transformers gives each subclass of a layer a forward that only wraps the one that it inherits.
        if forward is not None and getattr(forward, "__wrapped__", None) is not getattr(super(cls, cls), "forward", 0):
            return cls
    return nn.Module
