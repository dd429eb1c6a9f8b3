"""How figures look: one set of colours for light and one for dark pages, no global state."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Colours:
    """Colours of one theme; `accent` and `contrast` are told apart by colour-blind readers too."""

    ink: str
    faint: str
    paper: str
    accent: str
    contrast: str


LIGHT = Colours(ink="#1f2328", faint="#b6bcc4", paper="#ffffff", accent="#0b6bcb", contrast="#c2570c")
DARK = Colours(ink="#e3e6ea", faint="#565d66", paper="#16191d", accent="#5aa9f8", contrast="#f0a35e")


def need_matplotlib() -> None:
    """Raise a helpful error if matplotlib is missing.

    Raises:
        ImportError: it is.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib, which is not installed: `pip install 'lightning-gradtrace[plot]'`"
        ) from error


@contextmanager
def theme(colours: Colours) -> Iterator[None]:
    """Draw in these colours inside the `with` block; matplotlib's settings are put back afterwards."""
    need_matplotlib()
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "font.size": 9.0,
        "font.family": "DejaVu Sans",
        "axes.titlesize": 10.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "figure.facecolor": colours.paper,
        "axes.facecolor": colours.paper,
        "savefig.facecolor": colours.paper,
        "grid.color": colours.faint,
        "grid.linewidth": 0.5,
        "axes.edgecolor": colours.faint,
        **{key: colours.ink for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
    }
    with mpl.rc_context(settings):
        yield


def png(figure: Figure, dpi: int = 144) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
