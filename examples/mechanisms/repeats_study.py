"""Who built the induction head?"""

from __future__ import annotations

from examples.mechanisms.figure import draw_formation
from examples.mechanisms.heads_study import ablations, best_head, label, main_change, rise, who_moved, write_choice
from examples.mechanisms.study import Claim, Run


def study(run: Run) -> list[Claim]:
    """Check that an induction head formed, that it does the work, and that repeated samples moved it."""
    measures, control = run.measures(), run.measures("one_layer")
    head = best_head(measures, "prefix_matching")
    name = label(head)
    score = measures[f"prefix_matching.{name}"]
    (without,) = ablations(run, "second_half_accuracy")
    bump = rise(score)
    series = ("loss", "in_context_learning", f"prefix_matching.{name}")
    changes = {measure.partition(".")[0]: main_change(measures, measure) for measure in series}
    write_choice(run, head, bump, **{f"change_of_{measure}": step for measure, step in changes.items()})
    moved = who_moved(run, head, run.sequences.patterns["repeated"], bump)
    draw_formation(
        run,
        {"second-half accuracy": "second_half_accuracy", f"prefix matching of head {name}": f"prefix_matching.{name}"},
        bump,
        {"repeated:": moved},
    )
    return [
        Claim("second-half accuracy", measures["second_half_accuracy"].iloc[-1], ">=", 0.9),
        Claim("prefix matching of the best head", score.iloc[-1], ">=", 0.4),
        Claim("second-half accuracy of one layer", control["second_half_accuracy"].iloc[-1], "<", 0.2),
        Claim(
            "largest changes of loss, in-context learning and prefix matching apart, of all steps",
            (max(changes.values()) - min(changes.values())) / measures.index[-1],
            "<",
            0.1,
        ),
        Claim("accuracy without this head, of that with it", without[head] / without[None], "<", 0.5),
        Claim(
            "repeated samples in what pushed its queries during the bump: times their share, lower end",
            moved["low"]["query"],
            ">=",
            1.5,
        ),
        Claim("the same for its keys", moved["low"]["key"], ">=", 1.5),
        Claim("p-value of the permutation null, queries", moved["p_value"]["query"], "<", 0.01),
        Claim("p-value of the permutation null, keys", moved["p_value"]["key"], "<", 0.01),
    ]
