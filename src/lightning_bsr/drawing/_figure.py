"""Makes the figures of this package, all in one style."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning_bsr._errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FONT = {"font.size": 11.0}


def require_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            'Drawing needs matplotlib, which is not installed: pip install "lightning-bsr[plots]".'
        ) from error


@contextlib.contextmanager
def styled_figure(width: float, height: float, **style: Any) -> Iterator["Figure"]:
    """Give a figure to draw in while the context lasts; pyplot, which counts open figures, is not used.

    Args:
        width: In inches.
        height: In inches.
        **style: More of matplotlib's settings, with ``__`` for each dot.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_FONT | {name.replace("__", "."): value for name, value in style.items()}):
        yield Figure(figsize=(width, height), layout="constrained")
