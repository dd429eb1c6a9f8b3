"""Which head moves the name, and which samples made it?"""

from __future__ import annotations

from examples.mechanisms.figure import draw_formation
from examples.mechanisms.heads_study import ablations, rise, who_moved
from examples.mechanisms.study import Claim, Run


def study(run: Run) -> list[Claim]:
    """Check that the network tells the indirect object, also for names never asked about, and what made it."""
    measures = run.measures()
    without = ablations(run, "logit_difference.known")
    head = min((value, head) for head, value in without.items() if head is not None)[1]
    formed = rise(measures["logit_difference.known"])
    moved = who_moved(run, head, "asks", formed)
    last, difference = measures.iloc[-1], without[None]
    draw_formation(run, ["accuracy.known", "choice.held_out"], formed, moved, ["query", "key", "value"])
    return [
        Claim("accuracy, known names", last["accuracy.known"], ">=", 0.9),
        Claim("logit difference, known names", last["logit_difference.known"], ">=", 2.0),
        Claim("right of the two names, held-out names", last["choice.held_out"], ">=", 0.9),
        Claim("logit difference, held-out names", last["logit_difference.held_out"], ">=", 1.0),
        Claim(
            f"logit difference without head {head[0]}.{head[1]}, of that with it", without[head] / difference, "<", 0.5
        ),
        Claim(
            f"questions in its values' shifts, steps {formed.start}-{formed.stop}: times their share, lower end",
            moved["value"]["low"],
            ">=",
            1.0,
        ),
        Claim("p-value of the permutation null", moved["value"]["p_value"], "<", 0.01),
    ]
