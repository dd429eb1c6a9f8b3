"""What recording costs: plain training, GradTrace and other ways to per-sample gradients, side by side.

    python -m benchmarks.overhead --workload A --text wiki.valid.tokens --rounds 7 --steps 25
    python -m benchmarks.overhead --workload B --optimizer adamw
    python -m benchmarks.overhead --workload B --memory
    python -m benchmarks.overhead --scaling

Workload A is the reference experiment (docs/results/wikitext2.md): batch 20 x 35, vocabulary 28,782. B has two blocks
of width 768 with an MLP of 3072, batch 8 x 128 and a vocabulary of 1,000. All variants train the same model on the same
batches in one process. They take turns in short blocks, and the order changes from round to round, so that other load
on the machine falls on all of them. A block is timed from its third step to its end; for GradTrace the end is when the
trace is closed on disk. Reported are medians over the rounds and the median of the ratios within a round. Peak memory
is that of a fresh process per variant.
"""

from __future__ import annotations

import argparse
import logging
import platform
import warnings
from pathlib import Path

import pandas as pd
import torch

from benchmarks.peers import PEERS
from benchmarks.scaling import AXES, scaling
from benchmarks.timing import interleaved, peak_memory, table
from benchmarks.workloads import WORKLOADS


def times(arguments: argparse.Namespace) -> None:
    """Measure and print the table of times."""
    workload = WORKLOADS[arguments.workload]
    seconds, missing = interleaved(
        workload,
        arguments.optimizer,
        arguments.text,
        arguments.rounds,
        arguments.steps,
        arguments.k,
        arguments.only,
    )
    print(f"\nworkload {workload.name}, {arguments.optimizer}, {arguments.rounds} rounds of {arguments.steps} steps\n")
    print(table(seconds).round(3).to_string())
    for name, reason in missing.items():
        print(f"not available: {name}: {reason}")


def memory(arguments: argparse.Namespace) -> None:
    """Measure and print peak memory."""
    ours = [f"GradTrace, TopK({arguments.k})"]
    names = [name for name in [*ours, *PEERS] if arguments.only is None or arguments.only in name]
    peaks = {
        name: peak_memory(arguments.workload, arguments.optimizer, name, arguments.steps, arguments.k)
        for name in ["plain", *names]
    }
    found = pd.DataFrame({"peak MB": peaks}, dtype=float)
    found["+ MB"] = found["peak MB"] - found["peak MB"]["plain"]
    print(f"\nworkload {arguments.workload}, {arguments.optimizer}, {arguments.steps} steps, a process each\n")
    print(found.round(0).to_string(na_rep="not available"))


def main() -> None:
    """Measure and print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), default="A")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--text", type=Path, help="text file of the batches; without it, Zipf-distributed tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25, help="steps per block")
    parser.add_argument("--k", type=int, default=1000, help="entries kept per sample")
    parser.add_argument("--only", help="besides plain training, only variants whose name contains this")
    parser.add_argument("--memory", action="store_true", help="peak memory, one fresh process per variant")
    parser.add_argument("--scaling", nargs="*", choices=AXES, help="overhead against these sizes (none given: all)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.scaling is not None:
        found = scaling(
            WORKLOADS[arguments.workload],
            arguments.optimizer,
            arguments.rounds,
            arguments.steps,
            arguments.k,
            arguments.scaling or list(AXES),
        )
        print(f"\nfrom workload {arguments.workload}, {arguments.optimizer}; x plain\n")
        print(found.round(3).to_string(index=False))
    elif arguments.memory:
        memory(arguments)
    else:
        times(arguments)


if __name__ == "__main__":
    main()
