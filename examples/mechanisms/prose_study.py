"""Which head matches brackets in real English, and which samples and loss tokens made it?"""

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
from examples.mechanisms.prose import Prose
from examples.mechanisms.study import Claim, Run


def study(run: Run) -> list[Claim]:
    """Check that a head looks at the open bracket, that closing it needs this head, and what moved it."""
    assert isinstance(run.task, Prose)
    measures = run.measures()
    last = measures.iloc[-1]
    head = best_head(measures, "matching")
    name = label(head)
    score = measures[f"matching.{name}"]
    (without,) = ablations(run, "closing_loss")
    others = max(value for other, value in without.items() if other not in (None, head))
    formed = rise(score)
    write_choice(run, head, formed)
    moved = who_moved(run, head, run.sequences.patterns["closes_far"], formed)
    heads = moved_by_loss_tokens(run, run.task.closing, formed, without)
    draw_formation(
        run,
        {
            f"attention of head {name} to the bracket": f"matching.{name}",
            "probability of a closing one, if one is open": "closing_probability.open",
            "the same, if none is open": "closing_probability.none",
        },
        formed,
        {"closes a bracket:": moved},
        heads,
    )
    return [
        Claim(
            "probability of a closing bracket if one is open, of that if none is",
            last["closing_probability.open"] / last["closing_probability.none"],
            ">=",
            5.0,
        ),
        Claim(
            "attention of the best head to the open bracket, of even attention",
            last[f"matching.{name}"] / last["matching_uniform"],
            ">=",
            3.0,
        ),
        Claim("loss of closing brackets gained without this head", without[head] - without[None], ">=", 0.1),
        Claim("the same, more than without any other head", without[head] - others, ">=", 0.0),
        Claim(
            "samples that close a bracket in what pushed its queries: times their share, lower end",
            moved["low"]["query"],
            ">=",
            1.0,
        ),
        Claim("p-value of the permutation null", moved["p_value"]["query"], "<", 0.01),
        *loss_token_claims(heads, name),
    ]
