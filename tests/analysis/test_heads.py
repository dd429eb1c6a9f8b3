"""Attention heads equal the slices that the layouts of attention say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lightning_gradtrace.analysis import attention_heads
from lightning_gradtrace.analysis.heads import head_rows
from tests.analysis.traces import write_trace


def trace_of(shapes):
    return write_trace(shapes, np.array([[0]]), np.array([[0, 1]]), text={0: [1]})


def blocks(trace, heads):
    """Entries of each (head, part) as arrays of parameter-shaped booleans."""
    row = head_rows(trace, heads, np.arange(trace.n_entries))
    found = {}
    for place, one in enumerate(heads.itertuples()):
        param = trace.param(one.param)
        inside = row[param["offset"] : param["offset"] + param["numel"]] == place
        found[one.module, one.head, one.part] = inside.reshape(param["shape"])
    return found


def test_packed_attention_splits_rows_by_part_and_head():
    shapes = {"net.attn.in_proj_weight": (12, 4), "net.attn.out_proj.weight": (4, 4), "net.linear1.weight": (8, 4)}
    trace = trace_of(shapes)
    found = blocks(trace, attention_heads(trace, 2))
    assert len(found) == 8
    for head in range(2):
        for number, part in enumerate(("query", "key", "value")):
            expected = np.zeros((12, 4), bool)
            expected[number * 4 + head * 2 : number * 4 + head * 2 + 2] = True
            np.testing.assert_array_equal(found["net.attn", head, part], expected)
        expected = np.zeros((4, 4), bool)
        expected[:, head * 2 : head * 2 + 2] = True
        np.testing.assert_array_equal(found["net.attn", head, "output"], expected)


@pytest.mark.parametrize("kdim", [None, 6])
def test_heads_are_those_of_torch(kdim):
    """Zero the output columns of one head: what is left of the output is the other head's share."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, bias=False, kdim=kdim, batch_first=True)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    trace = trace_of(shapes)
    heads = attention_heads(trace, model=attention)
    assert len(heads) == 8
    x, memory = torch.randn(3, 5, 4), torch.randn(3, 5, kdim or 4)
    value = memory if kdim is None else torch.randn(3, 5, 4)
    memory = x if kdim is None else memory
    value = x if kdim is None else value
    whole = attention(x, memory, value)[0]
    parts = []
    for head in range(2):
        one = {name: p.detach().clone() for name, p in attention.named_parameters()}
        row = head_rows(trace, heads, np.arange(trace.n_entries))
        for name in one:
            param = trace.param(name)
            place = row[param["offset"] : param["offset"] + param["numel"]]
            other = np.isin(place, heads.index[heads["head"] != head]).reshape(param["shape"])
            one[name][torch.as_tensor(other)] = 0
        parts.append(torch.func.functional_call(attention, one, (x, memory, value))[0])
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert (parts[0] - whole).abs().max() > 0.01


def test_einsum_style_has_an_axis_of_heads():
    shapes = {f"blocks.0.attn.W_{p}": (3, 4, 2) if p != "O" else (3, 2, 4) for p in "QKVO"}
    trace = trace_of(shapes)
    heads = attention_heads(trace)
    assert set(heads["module"]) == {"blocks.0.attn"}
    for (_, head, _), inside in blocks(trace, heads).items():
        assert inside[head].all()
        assert inside.sum() == 8


def test_grouped_queries_and_packed_conv():
    shapes = {
        "l.q_proj.weight": (8, 8),
        "l.k_proj.weight": (4, 8),
        "l.v_proj.weight": (4, 8),
        "l.o_proj.weight": (8, 8),
    }
    heads = attention_heads(trace_of(shapes), 4)
    assert heads.groupby("part")["head"].nunique().to_dict() == {"query": 4, "key": 2, "value": 2, "output": 4}
    assert (heads["stop"] - heads["start"] == 2).all()
    trace = trace_of(
        {"h.0.attn.c_attn.weight": (4, 12), "h.0.attn.c_proj.weight": (4, 4), "h.0.mlp.c_proj.weight": (8, 4)}
    )
    found = blocks(trace, attention_heads(trace, {"h.*": 2}))
    assert {module for module, *_ in found} == {"h.0.attn"}
    assert found["h.0.attn", 1, "key"][:, 6:8].all()
    assert found["h.0.attn", 1, "key"].sum() == 8
    assert found["h.0.attn", 1, "output"][2:].all()
    assert found["h.0.attn", 1, "output"].sum() == 8


def test_other_weights_have_no_heads():
    assert len(attention_heads(trace_of({"out_proj.weight": (4, 4), "linear.weight": (4, 4), "W_E": (4, 4)}))) == 0


def test_what_does_not_fit_is_refused():
    trace = trace_of({"a.in_proj_weight": (12, 4)})
    with pytest.raises(ValueError, match="the number of heads of `a` is None, expected 1 or more; give `n_heads=4`"):
        attention_heads(trace)
    with pytest.raises(ValueError, match=r"axis 0 can't be split into 3 x 3 equal heads; give the right `n_heads`"):
        attention_heads(trace, 3)
    heads = attention_heads(trace, 2)
    with pytest.raises(ValueError, match=r"`heads` lacks the columns \['axis'\]"):
        head_rows(trace, heads.drop(columns="axis"), np.arange(3))
    with pytest.raises(ValueError, match=r"blocks of `a.in_proj_weight` that overlap, row 6 with an earlier one"):
        head_rows(trace, pd.concat([heads, heads.head(1)]), np.arange(48))
    with pytest.raises(ValueError, match="`heads` names `b`, which this trace doesn't track"):
        head_rows(trace, heads.assign(param="b"), np.arange(3))
