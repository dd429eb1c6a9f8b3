"""One analysis on several machines: spans of steps go to the workers of a dask cluster, partial results add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from lightning_gradtrace.analysis import _access
from lightning_gradtrace.analysis._access import Steps

if TYPE_CHECKING:
    from lightning_gradtrace.store import Trace

T = TypeVar("T")

# Spans per worker: enough to even out their speed, few enough to add up.
_SPANS = 3


def over_steps(
    client: Any, trace: Trace, steps: Steps, partial: Callable[..., T], combine: Callable[[T, T], T], *args: Any
) -> T:
    """Compute `partial(trace, *args, steps)`, at once or span by span on a cluster.

    Args:
        client: a `dask.distributed.Client`; None computes here and now.
        trace: an open trace, in a store that every worker can read.
        steps: step numbers to look at; None for all.
        partial: of the steps in its last argument.
        combine: puts the results of earlier and of later steps together.
        args: further arguments, sent to each worker once.

    Raises:
        TypeError: `client` is no dask client.
    """
    if client is None:
        return partial(trace, *args, steps)
    if not hasattr(client, "submit") or not hasattr(client, "scheduler_info"):
        raise TypeError(f"`client` is a {type(client).__name__}, expected a `dask.distributed.Client`, or None")
    mask = _access.occurrences_in(trace, steps)
    of_occurrence = trace.occurrences["step"].to_numpy()
    known = np.unique(of_occurrence if mask is None else of_occurrence[mask])
    workers = len(client.scheduler_info(n_workers=-1)["workers"])
    spans = [span for span in np.array_split(known, max(1, min(known.size, _SPANS * workers))) if span.size]
    if not spans:
        return partial(trace, *args, steps)
    # In one piece, and without a hash: equal pieces of two calls would be one, which the first call releases.
    held = client.scatter([(trace, *args)], broadcast=True, hash=False)[0]
    futures = [client.submit(_of_span, partial, held, span, pure=False) for span in spans]
    while len(futures) > 1:
        pairs = [futures[i : i + 2] for i in range(0, len(futures), 2)]
        futures = [client.submit(combine, *pair, pure=False) if len(pair) == 2 else pair[0] for pair in pairs]
    result: T = futures[0].result()
    return result


def _of_span(partial: Callable[..., T], held: tuple[Any, ...], span: Any) -> T:
    return partial(*held, span)


def joined(earlier: Any, later: Any) -> Any:
    """Put arrays, tuples of arrays or tables of earlier and of later steps together."""
    if isinstance(earlier, pd.DataFrame):
        return pd.concat([earlier, later], ignore_index=True)
    if isinstance(earlier, tuple):
        return tuple(map(joined, earlier, later))
    return np.concatenate([earlier, later])
