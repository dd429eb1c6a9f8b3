"""Who built the induction head?"""

from __future__ import annotations

from examples.mechanisms.figure import draw_formation
from examples.mechanisms.heads_study import ablations, best_head, label, main_change, rise, who_moved
from examples.mechanisms.study import Claim, Run


def study(run: Run) -> list[Claim]:
    """Check that an induction head formed, that it does the work, and that repeated samples moved it."""
    measures, control = run.measures(), run.measures("one_layer")
    head = best_head(measures, "prefix_matching")
    name = label(head)
    score = measures[f"prefix_matching.{name}"]
    without = ablations(run, "second_half_accuracy")
    bump = rise(score)
    series = ("loss", "in_context_learning", f"prefix_matching.{name}")
    changes = [main_change(measures, measure) for measure in series]
    moved = who_moved(run, head, run.sequences.patterns["repeated"], bump)
    draw_formation(
        run,
        {"second-half accuracy": "second_half_accuracy", f"prefix matching of head {name}": f"prefix_matching.{name}"},
        bump,
        {"repeated samples": moved},
    )
    return [
        Claim("second-half accuracy", measures["second_half_accuracy"].iloc[-1], ">=", 0.9),
        Claim(f"prefix matching of head {name}", score.iloc[-1], ">=", 0.4),
        Claim("second-half accuracy of one layer", control["second_half_accuracy"].iloc[-1], "<", 0.2),
        Claim(
            f"spread of the largest changes of loss, in-context learning and prefix matching ({changes}), of all steps",
            (max(changes) - min(changes)) / measures.index[-1],
            "<",
            0.1,
        ),
        Claim(f"accuracy without head {name}, of that with it", without[head] / without[None], "<", 0.5),
        Claim(
            f"repeated samples in its queries' shifts, steps {bump.start}-{bump.stop}: times their share, lower end",
            moved["low"]["query"],
            ">=",
            1.5,
        ),
        Claim("the same for its keys", moved["low"]["key"], ">=", 1.5),
        Claim("p-value of the permutation null, queries", moved["p_value"]["query"], "<", 0.01),
        Claim("p-value of the permutation null, keys", moved["p_value"]["key"], "<", 0.01),
    ]
