"""Which head matches brackets, and which samples made it?"""

from __future__ import annotations

from examples.mechanisms.figure import draw_formation
from examples.mechanisms.heads_study import ablations, best_head, rise, who_moved
from examples.mechanisms.study import Claim, Run


def study(run: Run) -> list[Claim]:
    """Check that a head looks at the bracket to be closed, that it does the work, and which samples moved it."""
    measures = run.measures()
    head = best_head(measures, "matching")
    name = f"{head[0]}.{head[1]}"
    score = measures[f"matching.{name}"]
    without = ablations(run, "closing_accuracy")
    others = min(value for other, value in without.items() if other not in (None, head))
    formed = rise(score)
    moved = who_moved(run, head, "closes_outer", formed)
    draw_formation(run, ["closing_accuracy", f"matching.{name}"], formed, moved, ["query", "key"])
    return [
        Claim("closing accuracy", measures["closing_accuracy"].iloc[-1], ">=", 0.9),
        Claim(f"attention of head {name} to the bracket to be closed", score.iloc[-1], ">=", 0.4),
        Claim(f"closing accuracy lost without head {name}", without[None] - without[head], ">=", 0.05),
        Claim("the same, more than without any other head", others - without[head], ">=", 0.0),
        Claim(
            f"samples that close an outer bracket in its queries' shifts, steps {formed.start}-{formed.stop}: "
            "times their share, lower end",
            moved["query"]["low"],
            ">=",
            1.0,
        ),
        Claim("p-value of the permutation null", moved["query"]["p_value"], "<", 0.01),
    ]
