"""What recording costs: plain training, GradTrace and other ways to per-sample gradients, side by side.

    python -m benchmarks.overhead --workload A --text wiki.valid.tokens --rounds 7 --steps 25
    python -m benchmarks.overhead --workload B --optimizer adamw --threads 2
    python -m benchmarks.overhead --workload C --device cuda --precision bf16-mixed --json c.json
    python -m benchmarks.overhead --workload B --memory
    python -m benchmarks.overhead --workload B --scaling width k --rounds 3 --steps 6

Workload A is the reference experiment (docs/results/wikitext2.md): batch 20 x 35, vocabulary 28,782. B has two blocks
of width 768 with an MLP of 3072, batch 8 x 128 and a vocabulary of 1,000. C, for GPUs, has twelve such blocks, batch 8
x 512 and a vocabulary of 10,000. All variants train the same model on the same batches in one process. They take turns
in short blocks, and the order changes from round to round, so that other load on the machine falls on all of them. A
block is timed from its third step to its end; for GradTrace the end is when the trace is closed on disk, and on a GPU
both ends wait for it. Reported are medians over the rounds and the median of the ratios within a round. Peak memory is
that of a fresh process per variant.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.output import machine, markdown, write_json
from benchmarks.peers import PEERS
from benchmarks.scaling import AXES, scaling
from benchmarks.timing import interleaved, peak_memory, table
from benchmarks.workloads import WORKLOADS, Setting


def times(setting: Setting, rounds: int, only: str | None) -> dict[str, Any]:
    """Measure, print and return the table of times."""
    seconds, missing = interleaved(setting, rounds, only)
    found = table(seconds)
    print(f"\n{rounds} rounds of {setting.steps} steps\n\n{markdown(found)}\n")
    for name, reason in missing.items():
        print(f"not available: {name}: {reason}")
    return {"times": found.to_dict("index"), "rounds": seconds.to_dict("list"), "not available": missing}


def memory(setting: Setting, only: str | None) -> dict[str, Any]:
    """Measure, print and return peak memory."""
    names = ["plain", *(name for name in [setting.ours, *PEERS] if only is None or only in name)]
    found = pd.DataFrame({"peak MB": {name: peak_memory(setting, name) for name in names}}, dtype=float)
    found["+ MB"] = found["peak MB"] - found["peak MB"]["plain"]
    print(f"\n{setting.steps} steps, a process each\n\n{markdown(found, 0)}\n")
    return {"memory": found.to_dict("index")}


def sizes(setting: Setting, rounds: int, axes: list[str]) -> dict[str, Any]:
    """Measure, print and return the table of overhead against sizes."""
    found = scaling(setting, rounds, axes or list(AXES))
    print(f"\n{rounds} rounds of {setting.steps} steps; x plain\n\n{markdown(found)}\n")
    return {"scaling": found.to_dict("records")}


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), default="A")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="32-true", help="as the Trainer takes it, e.g. bf16-mixed")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; without it as OMP_NUM_THREADS or torch says")
    parser.add_argument("--text", type=Path, help="text file of the batches; without it, Zipf-distributed tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25, help="steps per block")
    parser.add_argument("--k", type=int, default=1000, help="entries kept per sample")
    parser.add_argument("--only", help="besides plain training, only variants whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--memory", action="store_true", help="peak memory, one fresh process per variant")
    parser.add_argument("--scaling", nargs="*", choices=AXES, help="overhead against these sizes (none given: all)")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    """Measure and print what was asked for."""
    chosen = arguments_of(given)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    workload = WORKLOADS[chosen.workload]
    setting = Setting(workload, chosen.optimizer, chosen.device, chosen.precision, chosen.text, chosen.steps, chosen.k)
    facts = machine(chosen.device)
    print(", ".join(f"{name} {fact}" for name, fact in facts.items()))
    print(f"workload {chosen.workload}, {chosen.optimizer}, {chosen.device}, {chosen.precision}", flush=True)
    if chosen.scaling is not None:
        results = sizes(setting, chosen.rounds, chosen.scaling)
    elif chosen.memory:
        results = memory(setting, chosen.only)
    else:
        results = times(setting, chosen.rounds, chosen.only)
    if chosen.json is not None:
        about = {name: getattr(chosen, name) for name in ("workload", "optimizer", "device", "precision")}
        write_json(chosen.json, facts, {**about, **results})


if __name__ == "__main__":
    main()
