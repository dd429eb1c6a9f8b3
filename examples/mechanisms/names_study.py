"""Which head moves the name, and which samples made it?"""

from __future__ import annotations

import pandas as pd

from examples.mechanisms.figure import draw_formation
from examples.mechanisms.heads_study import ablations, best_head, label, rise, who_moved, write_choice
from examples.mechanisms.study import Claim, Run


def study(run: Run) -> list[Claim]:
    """Check that a head is needed to say the name, also names never asked about, and which samples made it.

    The head is the one that the configuration asks for (`choose_by`): "attention", the one that looks at the answer
    most, or "ablation", the one without which least of the logit difference is left on questions kept for choosing.
    """
    measures, choice = run.measures(), run.cfg.choose_by
    choosing, known, strange = ablations(run, *(f"logit_difference.{s}" for s in ("choosing", "known", "held_out")))
    heads = {head: value for head, value in choosing.items() if head is not None}
    head = min(heads, key=heads.__getitem__) if choice == "ablation" else best_head(measures, "looks_at_answer.known")
    name = label(head)
    formed = rise(measures["logit_difference.known"])
    write_choice(run, head, formed)
    patterns = run.sequences.patterns
    moved = who_moved(run, head, patterns["asks"], formed)
    order = who_moved(run, head, patterns["subject_first"][patterns["asks"]], formed, "who_moved_control")
    draw_formation(
        run,
        {
            "accuracy, known names": "accuracy.known",
            "right of the two, held-out names": "choice.held_out",
            f"attention of head {name} to the answer": f"looks_at_answer.known.{name}",
        },
        formed,
        {"question:": moved, "control, subject first:": order},
    )
    last, left, left_of_strange = measures.iloc[-1], known[head] / known[None], strange[head] / strange[None]
    needed = Claim("logit difference without this head, of that with it", left, "<", 0.5)
    if choice == "ablation":
        of_head = [needed, Claim("the same, held-out names", left_of_strange, "<", 0.5), *made_by(moved, order, "all")]
    else:
        looks = [last[f"looks_at_answer.{kind}.{name}"] for kind in ("known", "held_out")]
        of_head = [
            Claim("attention of the best head to the answer, known names", looks[0], ">=", 0.4),
            Claim("the same, held-out names", looks[1], ">=", 0.4),
            needed,
            *made_by(moved, order, "query"),
        ]
    return [*learned(run), *of_head]


def learned(run: Run) -> list[Claim]:
    """Return what is claimed of the network and its controls."""
    last = run.measures().iloc[-1]
    unlearnable, shallow = (run.measures(control).iloc[-1] for control in ("random_answers", "one_layer"))
    return [
        Claim("accuracy, known names", last["accuracy.known"], ">=", 0.9),
        Claim("logit difference, known names", last["logit_difference.known"], ">=", 2.0),
        Claim("right of the two names, held-out names", last["choice.held_out"], ">=", 0.9),
        Claim("logit difference, held-out names", last["logit_difference.held_out"], ">=", 1.0),
        Claim("right of the two names, known names, trained on random answers", unlearnable["choice.known"], "<", 0.6),
        Claim("right of the two names, held-out names, one layer", shallow["choice.held_out"], "<", 0.9),
    ]


def made_by(moved: pd.DataFrame, order: pd.DataFrame, part: str) -> list[Claim]:
    """Return what is claimed of the samples that pushed the head.

    Args:
        moved: from `who_moved`, of questions.
        order: from `who_moved`, of the control.
        part: of the head.
    """
    what = "it" if part == "all" else "its queries"
    return [
        Claim(f"questions in what pushed {what}: times their share, lower end", moved["low"][part], ">=", 1.0),
        Claim("p-value of the permutation null", moved["p_value"][part], "<", 0.01),
        Claim("p-value of the control: the subject named first, among questions", order["p_value"][part], ">=", 0.01),
    ]
