"""Opens damaged and hostile copies of a trace and reads everything; each must be a working trace or a StoreError.

    python -m tests.store.fuzz --stores 10000

The process limits its own memory and time, and a hook of the interpreter's audit refuses to run programs, to load code
or to unpickle while a mutated store is open.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
import torch
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from lightning_gradtrace import Dense, Factored, GradTrace, Norms, Sketch, TokenGrads, TopK, Trace, open_trace
from lightning_gradtrace.record import Gains, LogSpaced, Record, StepRanges
from lightning_gradtrace.store import StoreError
from tests.test_callback import VOCAB, fit, make

MEMORY = 1_500_000_000
"""Bytes of address space that reading may take beyond what the process has at the start."""

SECONDS = 20
"""CPU time that one store may take; fifteen times as much may pass on a loaded machine."""

FORBIDDEN = ("exec", "compile", "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")

Objects = dict[str, bytes]
_VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**40, 2**63, 2**70, 1e308, float("nan"), "", "NaN", "..", "/etc/passwd"),
    *(
        "float32",
        "uint8",
        "|O",
        "r8",
        "pickle",
        "numcodecs.pickle",
        "gzip",
        "string",
        [],
        {},
        [[]],
        [1] * 40,
        {"a": []},
    ),
    *([10**12, 10**12], [2**62], {"name": "object", "configuration": {}}, "os.system", "\x00", "../../x"),
]


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the places of a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in items for place in _places(value, (*path, key)))]


def mutate_document(objects: Objects, rng: random.Random) -> None:
    """Change, remove, rename or nest a place of the root document, most often one of few that matter."""
    root = json.loads(objects["zarr.json"])
    members = root["consolidated_metadata"]["metadata"]
    roots = [root, root["attributes"], root["attributes"]["committed"], members[rng.choice(sorted(members))]]
    node = rng.choice(roots)
    place = rng.choice(_places(node)[1:])
    for key in place[:-1]:
        node = node[key]
    what = rng.random()
    if what < 0.6:
        node[place[-1]] = copy.deepcopy(rng.choice(_VALUES))
    elif what < 0.75:
        del node[place[-1]]
    elif what < 0.85 and isinstance(node, dict):
        node[str(rng.choice(_VALUES))] = node.pop(place[-1])
    elif what < 0.95 and isinstance(node[place[-1]], int):
        node[place[-1]] = node[place[-1]] * rng.choice([-1, 0, 2, 10**6]) + rng.choice([-1, 0, 1])
    else:
        deep: Any = 0
        for _ in range(rng.choice([10, 500])):
            deep = [deep]
        node[place[-1]] = deep
    objects["zarr.json"] = json.dumps(root).encode()


def mutate_bytes(objects: Objects, rng: random.Random) -> None:
    """Flip, cut, repeat or replace bytes of any object."""
    key = rng.choice(sorted(objects)) if rng.random() < 0.8 else "zarr.json"
    data = bytearray(objects[key])
    what = rng.random()
    if what < 0.5:
        for _ in range(rng.choice([1, 1, 4, 30])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif what < 0.7:
        del data[rng.randrange(len(data)) :]
    elif what < 0.8:
        data *= rng.choice([0, 2, 30])
    elif what < 0.9:
        data = bytearray(rng.randbytes(rng.choice([0, 1, 20, 500])))
    else:
        data = bytearray(b"[" * 100_000)
    objects[key] = bytes(data)


def mutate_content(objects: Objects, rng: random.Random) -> None:
    """Change the bytes of a chunk and make its checksum fit, as somebody would who means harm."""
    key = rng.choice([key for key in sorted(objects) if not key.endswith("zarr.json")])
    data = bytearray(objects[key][:-4])
    for _ in range(rng.choice([1, 2, 10])):
        at = rng.randrange(min(len(data), rng.choice([16, len(data)])))
        data[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    objects[key] = bytes(data) + int(google_crc32c.value(bytes(data))).to_bytes(4, "little")


def mutate_objects(objects: Objects, rng: random.Random) -> None:
    """Remove an object, or put it in the place of another one."""
    key = rng.choice(sorted(objects))
    if rng.random() < 0.5:
        del objects[key]
    else:
        objects[key] = objects[rng.choice(sorted(objects))]


MUTATIONS = (mutate_document, mutate_document, mutate_bytes, mutate_content, mutate_objects)


def record(*records: Record) -> MemoryStore:
    """Record a small training of a table, a matrix and a bias, so that there are shares of every form."""
    store = MemoryStore()
    model = make()
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=0.1)  # type: ignore[method-assign]
    words = [f"word{i}" for i in range(VOCAB)]
    tracked = ["embedding.weight", "encoder.layers.0.linear1.*"]
    recorder = GradTrace(store, list(records), tracked, vocab=words, weights_every_n_steps=4)
    fit(model, recorder, max_epochs=None, max_steps=6)
    return store


def bases() -> list[MemoryStore]:
    """Record traces that hold every kind of record, with schedules of every kind among them."""
    return [
        record(TopK(5), TopK(7, per="step", schedule=2)),
        record(Dense(), Norms(schedule=LogSpaced(3)), TokenGrads(k=3, slots=2, schedule=lambda step: step == 1)),
        record(Factored("factors", schedule=StepRanges([(0, 2), (4, None)]))),
        record(Dense(keep_bits=7, schedule=3), Sketch(4), Gains()),
    ]


def read_everything(store: MemoryStore) -> None:
    """Open a trace and read all of it, in every way that tables and analyses do."""
    trace = open_trace(store)
    repr(trace)
    trace._repr_html_()
    str(trace.verify())
    trace.steps, trace.occurrences  # noqa: B018
    for record in trace.records:
        if record in READERS:
            READERS[record](trace)
    ids, _ = trace.tokens()
    if len(ids):
        trace.inputs(ids[:3])
        if trace.vocab is not None:
            trace.text(int(ids[0]))
    for step in trace.weight_steps[:2]:
        for name in trace.params["param"]:
            if f"weights/values/{name}" in trace.group:
                trace.weights(name, int(step))


def _read_topk(trace: Trace, record: str) -> None:
    view = trace.using(record).topk
    for block in view.blocks(100_000):
        trace.entries(block.entry)
    view.frame()


def _read_dense(trace: Trace) -> None:
    for array in trace.dense.values():
        array.shifts(array.occurrence[:2])
        array[:]


def _read_factored(trace: Trace) -> None:
    for found in trace.factored.values():
        found.shifts(found.occurrence[:2])
        for occurrence in found.occurrence[:1]:
            with contextlib.suppress(ValueError):  # what was kept written out has no positions
                found.by_position(int(occurrence))


def _read_sketch(trace: Trace) -> None:
    some = trace.sketch.occurrence[:3]
    trace.sketch.inner(some, some)
    trace.sketch.similarity(some, some)


def _read_gains(trace: Trace) -> None:
    for name in trace.group["gains"]:
        trace.read(f"gains/{name}/gain")


READERS: dict[str, Callable[[Trace], Any]] = {
    "topk": lambda trace: _read_topk(trace, "topk"),
    "topk_step": lambda trace: _read_topk(trace, "topk_step"),
    "dense": _read_dense,
    "factored": _read_factored,
    "sketch": _read_sketch,
    "norms": lambda trace: trace.norms.total(),
    "token_grads": lambda trace: trace.token_grads.frame(),
    "gains": _read_gains,
}


def fuzz(n_stores: int, seed: int = 0, first: int = 0) -> Counter[str]:
    """Try mutated stores and count how they end: "refused" with a StoreError, or "read".

    Raises:
        AssertionError: with the numbers of the stores, if anything else happens.
    """
    made = bases()
    originals = [{key: value.to_bytes() for key, value in base._store_dict.items()} for base in made]
    for base in made:
        read_everything(base)
    assert {kind for base in made for kind in open_trace(base).records} == set(READERS)
    buffer = default_buffer_prototype().buffer
    outcomes: Counter[str] = Counter()
    watching, failures = [False], list[str]()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in FORBIDDEN:
            raise AssertionError(f"{event} was called: {str(arguments)[:200]}")

    def too_long(*_: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGPROF, too_long)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in range(first, first + n_stores):
        rng = random.Random(seed * 1_000_003 + number)
        objects = dict(originals[number % len(originals)])
        for _ in range(rng.choice([1, 1, 2, 3])):
            # What an earlier mutation has made unreadable can't be changed any further.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                rng.choice(MUTATIONS)(objects, rng)
        buffers = {key: buffer.from_bytes(data) for key, data in objects.items()}
        signal.alarm(15 * SECONDS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        watching[0] = True
        try:
            read_everything(MemoryStore(buffers))
            outcomes["read"] += 1
        except StoreError as error:
            assert len(str(error)) < 5000
            outcomes["refused"] += 1
        except BaseException as error:
            watching[0] = False
            frames = traceback.extract_tb(error.__traceback__)
            where = [frame for frame in frames if "gradtrace" in frame.filename or "tests" in frame.filename][-4:]
            places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(where))
            failures.append(f"store {number} of seed {seed}: {type(error).__name__}: {str(error)[:200]} ({places})")
            print(failures[-1], flush=True)
            del error
        finally:
            watching[0] = False
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        if (number - first + 1) % 500 == 0:
            print(f"{number - first + 1} stores: {dict(outcomes)}, {len(failures)} others", flush=True)
    assert not failures, "\n".join(failures)
    return outcomes


def main() -> None:
    """Fuzz and print the outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stores", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first store, to look at one again")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    outcomes = fuzz(arguments.stores, arguments.seed, arguments.first)
    print(f"{sum(outcomes.values())} mutated stores: {outcomes['refused']} refused, {outcomes['read']} read, 0 others")


if __name__ == "__main__":
    main()
