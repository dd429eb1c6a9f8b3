"""Arguments of another kind are refused where GradTrace is made, in words."""

from __future__ import annotations

import pytest

from lightning_gradtrace import GradTrace, TopK


@pytest.mark.parametrize("record", [5, TopK, "topk", [TopK(3), 5]])
def test_what_is_no_record_is_refused(record):
    with pytest.raises(TypeError, match=r"`GradTrace\(record=...\)`: found .*, expected a record such as"):
        GradTrace("a.zarr", record=record)


@pytest.mark.parametrize("params", [3, [3], {"fc.weight": True}.items()])
def test_what_is_no_filter_is_refused(params):
    with pytest.raises(TypeError, match="expected a glob or a list of globs on the names of parameters"):
        GradTrace("a.zarr", params=params)


@pytest.mark.parametrize("params", ["fc.*", ["fc.*"], ("a", "b"), {"a"}, None, lambda name, parameter: True])
def test_filters_are_kept_as_they_are(params):
    assert GradTrace("a.zarr", params=params).params is params


def test_the_trainer_of_another_package_is_refused(tmp_path):
    class Trainer:
        """As that of `pytorch_lightning`, which is not the one of `lightning.pytorch`."""

    Trainer.__module__ = "pytorch_lightning.trainer.trainer"
    with pytest.raises(TypeError, match="comes from the package `pytorch_lightning`, expected one of `lightning`"):
        GradTrace(tmp_path / "a.zarr").setup(Trainer(), None, "fit")
    assert not (tmp_path / "a.zarr").exists()
