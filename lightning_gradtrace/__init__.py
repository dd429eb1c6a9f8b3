"""Record which training sample moved which weight, at every step, and ask questions of that record afterwards.

The public names are loaded when they are asked for, so that reading a trace needs neither Lightning nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gradtrace.callback import GradTrace as GradTrace
    from lightning_gradtrace.record.dense import Dense as Dense
    from lightning_gradtrace.record.division import Division as Division
    from lightning_gradtrace.record.factored import Factored as Factored
    from lightning_gradtrace.record.gains import Gains as Gains
    from lightning_gradtrace.record.norms import Norms as Norms
    from lightning_gradtrace.record.sketch import Sketch as Sketch
    from lightning_gradtrace.record.token_grads import TokenGrads as TokenGrads
    from lightning_gradtrace.record.topk import TopK as TopK
    from lightning_gradtrace.store.reader import Trace as Trace
    from lightning_gradtrace.store.reader import open_trace as open_trace

__version__ = "0.1.0"

_PLACES = {
    "GradTrace": "callback",
    "TokenGrads": "record.token_grads",
    "TopK": "record.topk",
    "Dense": "record.dense",
    "Division": "record.division",
    "Factored": "record.factored",
    "Sketch": "record.sketch",
    "Gains": "record.gains",
    "Norms": "record.norms",
    "Trace": "store.reader",
    "open_trace": "store.reader",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _PLACES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """List the public names too."""
    return sorted([*globals(), *_PLACES])
