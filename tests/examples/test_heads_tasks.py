"""The tasks of the studies of heads: their texts hold what they say, their patterns are what a loop finds."""

from __future__ import annotations

import pytest
import torch

from examples.mechanisms.names import ANSWER, FIRST, NAMES, SECOND, SUBJECT, Names
from examples.mechanisms.nesting import KINDS, Nesting
from examples.mechanisms.prose import Prose
from examples.models import CircuitTransformer
from examples.models.circuit_model import IGNORE


def test_brackets_close_the_innermost_open_one() -> None:
    task = Nesting(context=30)
    data = task.sequences(200, seed=1)
    closer = {kind[0]: kind[1] for kind in KINDS}
    outer = []
    for row in torch.cat([data.tokens, data.targets[:, -1:]], 1):
        stack, found = [], False
        for number, token in enumerate(row.tolist()):
            word = task.words[token]
            if word in closer:
                stack.append(word)
            elif word in closer.values():
                found |= len(stack) >= 2 and number > 0
                assert closer[stack.pop()] == word
        outer.append(found)
    assert outer == data.patterns["closes_outer"].tolist()
    assert 0 < sum(outer) < 200


def test_held_out_names_are_told_of_and_never_asked_about() -> None:
    task = Names(n_held_out_names=8)
    data = task.sequences(600, seed=2)
    strange = {task.words.index(name) for name in NAMES[-8:]}
    asked, told = set(), set()
    for tokens, targets, asks in zip(data.tokens, data.targets, data.patterns["asks"], strict=True):
        words = [task.words[t] for t in tokens.tolist()]
        (asked if asks else told).update(tokens.tolist())
        if asks:
            first, second, subject = words[1], words[3], words[9]
            assert task.words[targets[13]] == ({first, second} - {subject}).pop()
            assert (targets[14:] == IGNORE).all()
    assert not asked & strange
    assert strange <= told


def test_random_answers_are_either_name_and_leave_all_else_as_it_was() -> None:
    plain, control = Names().sequences(400, seed=5), Names(random_answers=True).sequences(400, seed=5)
    asks = torch.tensor(plain.patterns["asks"].to_numpy())
    assert torch.equal(plain.tokens[:, :ANSWER], control.tokens[:, :ANSWER])
    assert torch.equal(plain.targets[~asks], control.targets[~asks])
    answers, subjects = control.targets[asks, ANSWER - 1], control.tokens[asks, SUBJECT]
    assert ((answers == control.tokens[asks, FIRST]) | (answers == control.tokens[asks, SECOND])).all()
    assert 0.4 < (answers == subjects).float().mean() < 0.6
    assert not (plain.targets[asks, ANSWER - 1] == plain.tokens[asks, SUBJECT]).any()


def test_pieces_of_prose_close_brackets_that_a_stack_has_open() -> None:
    task = Prose(context=20, stride=50)
    data = task.sequences(0, seed=0)
    assert torch.equal(data.tokens[:, 1:], data.targets[:, :-1])
    for tokens, targets, far in zip(data.tokens, data.targets, data.patterns["closes_far"], strict=True):
        stack: list[int] = []
        found = False
        for position, (token, target) in enumerate(zip(tokens.tolist(), targets.tolist(), strict=True)):
            if task.words[token] == "(":
                stack.append(position)
            elif task.words[token] == ")" and stack:
                stack.pop()
            found |= task.words[target] == ")" and bool(stack) and stack[-1] < position
        assert found == far
    assert 0 < data.patterns["closes_far"].mean() < 1


def test_every_task_measures_every_head() -> None:
    for task, name in ((Names(), "looks_at_answer.known"), (Nesting(context=12), "matching"), (Prose(), "matching")):
        network = CircuitTransformer(len(task.words), task.context, n_layers=2, width=8, n_heads=[2, 1]).eval()
        with torch.no_grad():
            values = task.measure(network)
        assert {key for key in values if key.startswith(f"{name}.")} == {
            f"{name}.{head}" for head in ("0.0", "0.1", "1.0")
        }
        assert all(0 <= values[f"{name}.{head}"] <= 1 for head in ("0.0", "0.1", "1.0"))


def test_heads_are_a_number_for_all_layers_or_one_for_each() -> None:
    network = CircuitTransformer(7, 4, n_layers=2, width=8, n_heads=[4, 1])
    assert [tuple(layer.W_Q.shape) for layer in network.attention] == [(4, 8, 2), (1, 8, 8)]
    for heads in ([4], [4, 3], 3):
        with pytest.raises(ValueError, match="expected heads that divide the width, one number for all layers or one"):
            CircuitTransformer(7, 4, n_layers=2, width=8, n_heads=heads)
