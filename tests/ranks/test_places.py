"""Two ranks write to one URL of an object store, also over a bad connection; places they don't share are refused."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import fsspec
import pytest
from zarr.storage import FsspecStore

from lightning_gradtrace import Trace, open_trace
from tests.ranks import places
from tests.ranks.launch import Job, Outcome, launch, values
from tests.ranks.places import SECRETS
from tests.store.s3 import Proxy, s3_server
from tests.store.test_resuming import assert_same_arrays

UNSHARED = ["memory", "zip", "a directory of each"]
pytestmark = pytest.mark.timeout(900)  # the first test waits for all trainings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        fsspec.filesystem("s3", endpoint_url=url, **SECRETS).mkdir("ranks")
        yield url


@pytest.fixture(scope="module")
def proxy(server: str) -> Iterator[Proxy]:
    proxy = Proxy(urlparse(server).port or 0, drop_every=7)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def outcomes(folder: Path, server: str, proxy: Proxy) -> dict[str, list[Outcome]]:
    jobs = {
        "here": Job(places.recorded_here, ("here.zarr",)),
        "dropped": Job(places.recorded, (proxy.url, "s3://ranks/dropped.zarr")),
        "killed": Job(places.killed, (server, "s3://ranks/killed.zarr")),
        "whole": Job(places.whole),
        "resumed": Job(places.resumed, (proxy.url, "s3://ranks/resumed.zarr")),
        **{kind: Job(places.refused, (kind,)) for kind in UNSHARED},
    }
    return dict(zip(jobs, launch(folder, list(jobs.values())), strict=True))


def opened(server: str, name: str) -> Trace:
    options = {"endpoint_url": server, **SECRETS}
    return open_trace(FsspecStore.from_url(f"s3://ranks/{name}.zarr", read_only=True, storage_options=options))


def test_over_a_connection_that_drops_puts_the_trace_is_the_one_that_a_directory_holds(folder, server, proxy, outcomes):
    values(outcomes["dropped"])
    assert proxy.n_dropped >= 5
    trace, expected = opened(server, "dropped"), open_trace(folder / "here.zarr")
    assert trace.attrs["complete"] and trace.attrs["ranks"] == 2 and trace.verify().ok
    assert trace.occurrences.equals(expected.occurrences) and trace.steps.equals(expected.steps)
    assert trace.topk.frame().equals(expected.topk.frame())
    assert trace.topk_step.frame().equals(expected.topk_step.frame())


def test_a_killed_rank_leaves_the_steps_that_all_have_committed(folder, server, outcomes):
    assert outcomes["killed"][1].exitcode == -signal.SIGKILL
    trace, whole = opened(server, "killed"), open_trace(folder / "here.zarr")
    assert trace.n_steps == trace.parts[1].n_steps == 2 <= trace.parts[0].n_steps
    assert trace.verify().ok and not trace.attrs["complete"]
    assert trace.topk.frame().equals(whole.topk.frame(steps=slice(0, 1)))


def test_a_resumed_training_ends_with_the_same_parts(folder, server, outcomes):
    values(outcomes["resumed"])
    trace, whole = opened(server, "resumed"), open_trace(folder / "whole.zarr")
    assert trace.attrs["complete"] and trace.n_steps == whole.n_steps == 9 and trace.verify().ok
    for found, expected in zip(trace.parts, whole.parts, strict=True):
        assert_same_arrays(found, expected)
        assert found.attrs["resumed"][0]["steps"] == 4


@pytest.mark.parametrize("kind", UNSHARED)
def test_a_place_that_the_ranks_do_not_share_is_refused(kind, outcomes):
    zero, one = values(outcomes[kind])
    if kind == "zip":
        assert zero.startswith("StoreError: ") and "is a zip file, in which nothing can be replaced" in zero
        assert one.startswith("RankError: rank 0 (StoreError: ")
    else:
        assert one.startswith("StoreError: ") and "does not hold what rank 0 has just written there" in one
        assert "expected a place that all processes share" in one
        assert zero.startswith("RankError: rank 1 (StoreError: ")
