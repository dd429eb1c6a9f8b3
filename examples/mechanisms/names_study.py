"""Which head moves the name, and which samples made it?"""

from __future__ import annotations

from examples.mechanisms.figure import draw_formation
from examples.mechanisms.heads_study import ablations, best_head, label, rise, who_moved, write_choice
from examples.mechanisms.study import Claim, Run


def study(run: Run) -> list[Claim]:
    """Check that a head looks at the name to be said, also for names never asked about, and which samples made it."""
    measures, unlearnable, shallow = run.measures(), run.measures("random_answers"), run.measures("one_layer")
    last = measures.iloc[-1]
    head = best_head(measures, "looks_at_answer.known")
    name = label(head)
    looks = measures[f"looks_at_answer.known.{name}"]
    without = ablations(run, "logit_difference.known")
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
    return [
        Claim("accuracy, known names", last["accuracy.known"], ">=", 0.9),
        Claim("logit difference, known names", last["logit_difference.known"], ">=", 2.0),
        Claim("right of the two names, held-out names", last["choice.held_out"], ">=", 0.9),
        Claim("logit difference, held-out names", last["logit_difference.held_out"], ">=", 1.0),
        Claim(
            "right of the two names, known names, trained on random answers",
            unlearnable["choice.known"].iloc[-1],
            "<",
            0.6,
        ),
        Claim("right of the two names, held-out names, one layer", shallow["choice.held_out"].iloc[-1], "<", 0.9),
        Claim("attention of the best head to the answer, known names", looks.iloc[-1], ">=", 0.4),
        Claim("the same, held-out names", last[f"looks_at_answer.held_out.{name}"], ">=", 0.4),
        Claim("logit difference without this head, of that with it", without[head] / without[None], "<", 0.5),
        Claim(
            "questions in what pushed its queries: times their share, lower end",
            moved["low"]["query"],
            ">=",
            1.0,
        ),
        Claim("p-value of the permutation null", moved["p_value"]["query"], "<", 0.01),
        Claim(
            "p-value of the control: the subject named first, among questions", order["p_value"]["query"], ">=", 0.01
        ),
    ]
