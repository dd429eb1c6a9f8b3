"""Which head matches brackets, and which samples and loss tokens made it?"""

from __future__ import annotations

from examples.mechanisms.figure import draw_formation
from examples.mechanisms.heads_study import (
    ablations,
    best_head,
    label,
    loss_token_claims,
    moved_by_loss_tokens,
    rise,
    who_moved,
    write_choice,
)
from examples.mechanisms.nesting import Nesting
from examples.mechanisms.study import Claim, Run


def study(run: Run) -> list[Claim]:
    """Check that a head looks at the bracket to be closed, that it does the work, and what moved it."""
    assert isinstance(run.task, Nesting)
    measures = run.measures()
    head = best_head(measures, "matching")
    name = label(head)
    score = measures[f"matching.{name}"]
    (without,) = ablations(run, "closing_accuracy")
    others = min(value for other, value in without.items() if other not in (None, head))
    formed = rise(score)
    write_choice(run, head, formed)
    moved = who_moved(run, head, run.sequences.patterns["closes_outer"], formed)
    errors = {other: 1 - accuracy for other, accuracy in without.items()}
    heads = moved_by_loss_tokens(run, run.task.closing, formed, errors)
    draw_formation(
        run,
        {"closing accuracy": "closing_accuracy", f"attention of head {name} to the bracket": f"matching.{name}"},
        formed,
        {"closes an outer one:": moved},
        heads,
    )
    return [
        Claim("closing accuracy", measures["closing_accuracy"].iloc[-1], ">=", 0.9),
        Claim("attention of the best head to the bracket to be closed", score.iloc[-1], ">=", 0.4),
        Claim("closing accuracy lost without this head", without[None] - without[head], ">=", 0.05),
        Claim("the same, more than without any other head", others - without[head], ">=", 0.0),
        Claim(
            "samples that close an outer bracket in what pushed its queries: times their share, lower end",
            moved["low"]["query"],
            ">=",
            1.0,
        ),
        Claim("p-value of the permutation null", moved["p_value"]["query"], "<", 0.01),
        *loss_token_claims(heads, name),
    ]
