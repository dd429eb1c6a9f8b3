"""Attention to a position, and the bracket that is open, against loops."""

from __future__ import annotations

import pytest
import torch

from lightning_gradtrace.measures import attention_to, innermost_open, prefix_matching_score


def test_attention_to_equals_a_loop_over_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 2, 5, 5, generator=generator).softmax(-1)
    keys = torch.randint(5, (3, 5), generator=generator)
    where = torch.rand(3, 5, generator=generator) < 0.5
    found = attention_to(attention, keys, where)
    for head in range(2):
        looked = [attention[b, head, q, keys[b, q]] for b in range(3) for q in range(5) if where[b, q]]
        torch.testing.assert_close(found[head], torch.stack(looked).mean())
    assert attention_to(attention, keys, torch.zeros_like(where)).isnan().all()


def test_prefix_matching_is_attention_to_what_followed_a_period_ago() -> None:
    attention = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    query = torch.arange(8)
    keys = (query - 3 + 1).clamp(min=0).expand(2, -1)
    expected = attention_to(attention, keys, (query >= 3).expand(2, -1))
    torch.testing.assert_close(prefix_matching_score(attention, 3), expected)


def test_keys_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`keys` has shape \(2, 4\) and `where` \(2, 5\); expected \(2, 5\)"):
        attention_to(torch.rand(2, 1, 5, 5), torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool))


def test_the_innermost_open_bracket_is_on_top_of_a_stack() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(6, (50, 20), generator=generator)  # 0, 1 open, 2, 3 close
    found = innermost_open(tokens, opening=[0, 1], closing=[2, 3])
    for row, places in zip(tokens.tolist(), found.tolist(), strict=True):
        stack: list[int] = []
        for position, token in enumerate(row):
            if token in (0, 1):
                stack.append(position)
            elif token in (2, 3) and stack:
                stack.pop()
            assert places[position] == (stack[-1] if stack else -1)
    assert (innermost_open(torch.full((2, 3), 5), [0], [2]) == -1).all()
