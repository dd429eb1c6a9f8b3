"""A script that trains with a strategy that starts its own processes: `python -m tests.ranks.started STRATEGY PATH`.

The process that was started, rank 0 or one that only waits, reads the trace when the training is over.
"""

from __future__ import annotations

import sys

from lightning_gradtrace import open_trace
from tests.ranks.training import fit, make, trace_callback
from tests.test_callback import Model


def main() -> None:
    """Train on two processes, then say what was recorded."""
    strategy, path = sys.argv[1:]
    callback = trace_callback(path)
    trainer = fit(make(Model), callback, strategy=strategy)
    if trainer.is_global_zero:
        trace = open_trace(path)
        assert trace.verify().ok
        print(f"steps {trace.n_steps}, complete {trace.attrs['complete']}, ranks {len(trace.parts)}")


if __name__ == "__main__":
    main()
