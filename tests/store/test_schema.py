"""The declared format: unique, described arrays whose codecs are in the Zarr 3 specification."""

from __future__ import annotations

import pytest
from zarr.core.metadata.v3 import ArrayV3Metadata

from lightning_gradtrace.store.codecs import array_document
from lightning_gradtrace.store.schema import AXES, CORE_SPECS, MAX_CHUNK_BYTES, ArraySpec, weight_spec

FIXED_AXES = ("param", "token", "rank")


def test_paths_are_unique():
    paths = [spec.path for spec in CORE_SPECS]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("spec", CORE_SPECS, ids=lambda spec: spec.path)
def test_every_array_is_described_and_understood_by_zarr_without_a_warning(spec):
    assert spec.axis in AXES + FIXED_AXES
    assert spec.long_name
    metadata = ArrayV3Metadata.from_dict(array_document(spec, 3))
    assert metadata.dimension_names == spec.dims
    assert metadata.attributes["long_name"] == spec.long_name
    assert metadata.codecs[-1].to_dict()["name"] == "crc32c"
    assert not any(codec.to_dict()["name"].startswith("numcodecs.") for codec in metadata.codecs)


def test_padding_is_told_apart_from_data():
    fills = {
        dtype: ArraySpec("g/a", ("step",), (), dtype, "x").fill_value for dtype in ("uint32", "int8", "bool", "str")
    }
    assert fills == {"uint32": 2**32 - 1, "int8": -1, "bool": False, "str": ""}
    nan = ArraySpec("g/a", ("step",), (), "float32", "x").fill_value
    assert nan != nan


def test_chunks_hold_whole_rows_of_about_4_megabytes():
    assert ArraySpec("topk/index", ("occurrence", "k"), (1000,), "uint32", "x").chunk_shape == (1000, 1000)
    assert ArraySpec("a/b", ("step", "k"), (10_000_000,), "float32", "x").chunk_shape == (1, 10_000_000)


def test_rows_larger_than_a_chunk_may_be_are_split():
    chunk = weight_spec("embedding.weight", (100_000, 4096), "float32").chunk_shape
    assert chunk[0] == 1 and chunk[2] == 4096
    assert 4 * chunk[1] * chunk[2] <= MAX_CHUNK_BYTES


def test_wrong_declarations_are_refused():
    with pytest.raises(ValueError, match=r"`a/b` has 2 dims .* but a shape_tail of 0 axes; expected one dim more"):
        ArraySpec("a/b", ("step", "k"), (), "float32", "x")
    with pytest.raises(ValueError, match=r"`a/b` has chunk_rows=0; expected at least 1, or None"):
        ArraySpec("a/b", ("step",), (), "float32", "x", chunk_rows=0)
