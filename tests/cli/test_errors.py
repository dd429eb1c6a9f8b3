"""Exit codes, errors of one sentence, hostile names, and what is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gradtrace.cli import _app
from tests.cli.conftest import Run
from tests.docs.pages import ROOT

READING = sorted(set(_app.COMMANDS) - {"plan", "export"})


@pytest.mark.parametrize("command", READING)
def test_no_trace_is_status_3(command: str, run: Run, tmp_path: Path) -> None:
    extra = {"bigrams": ("--embedding", "e"), "directions": ("--param", "p")}.get(command, ())
    done = run(command, tmp_path / "none.zarr", *extra)
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == f"gradtrace: `{tmp_path / 'none.zarr'}` does not exist; expected the directory of a trace\n"


@pytest.mark.parametrize("name", ["[red]a", "a\nb", "-x", "é 'q\"", "a;rm", "%s{x}"])
def test_hostile_names_of_traces_and_files(name: str, run: Run, trace_path: Path, tmp_path: Path) -> None:
    here = tmp_path / name
    here.mkdir()
    shutil.copytree(trace_path, here / f"{name}.zarr")
    done = run("info", here / f"{name}.zarr", "--output", here / f"{name}.json")
    assert done.exit_code == 0, done.stderr
    assert json.loads((here / f"{name}.json").read_text(encoding="utf-8"))["command"] == "info"
    assert done.stderr.count("\n") == 1
    assert [file.name for file in sorted(here.iterdir())] == sorted([f"{name}.json", f"{name}.zarr"])
    missing = run("info", here / "none")
    assert missing.exit_code == 3 and missing.stderr.count("\n") == 1


def test_verify_finds_damage_with_status_1(run: Run, trace_path: Path, tmp_path: Path) -> None:
    assert run("verify", trace_path).exit_code == 0
    damaged = tmp_path / "damaged.zarr"
    shutil.copytree(trace_path, damaged)
    chunk = next(
        file for file in sorted((damaged / "topk" / "shift").rglob("*")) if file.is_file() and file.name != "zarr.json"
    )
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 255
    chunk.write_bytes(bytes(content))
    done = run("verify", damaged)
    assert done.exit_code == 1 and "problem: `topk/shift` chunk" in done.stdout
    document = json.loads(run("verify", damaged, "--json").stdout)
    assert {"kind": "ok", "text": "false"} in document["rows"]
    assert [row["kind"] for row in document["rows"]].count("problem") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("outliers", "T", "--of", "x"), "`of` is 'x', expected one of 'step', 'sample', 'param', 'neuron', 'entry'"),
        (("outliers", "T", "--steps", "9:3"), "'9:3' ends before it begins"),
        (("outliers", "T", "--steps", "a:b"), "'a:b' is no range of steps; write 100:200, 100:, :200 or 150"),
        (("outliers", "T", "--steps", "900:"), "`steps` matches no occurrence of this trace"),
        (("outliers", "T", "--output", "x.txt"), "`x.txt` ends neither in .csv nor in .json"),
        (("outliers", "T", "--output", "/no/such/x.csv"), "there is no folder `/no/such`"),
        (("outliers", "T", "--record", "topk_step"), "this trace holds no `topk_step` record; it holds: topk"),
        (("heads", "T", "--heads", "four"), "'four' is no number of heads"),
        (("weights", "T", "--spectra", "--neurons"), "give one of --spectra and --neurons"),
        (("bigrams", "T", "--embedding", "none"), "none"),
        (("directions", "T", "--param", "none"), "`none` is not tracked in this trace"),
        (("directions", "T", "--param", "head.weight", "--axis", "weight"), "directions of all weights need --basis"),
        (("directions", "T", "--param", "head.weight", "--basis", "no.npy"), "`no.npy` can't be read"),
        (("directions", "T", "--param", "head.weight", "--record", "dense"), "reads a record 'dense'"),
        (("plan", "--steps", 5, "--samples", 1), "give one of --model and --like"),
        (("plan", "--like", "T", "--steps", 5, "--samples", 1, "--record", "all"), "`all` is no record"),
        (("export", "T", "x", "--format", "xls"), "`xls` is neither parquet nor csv"),
        (("ablate", "T", "--show", "x"), "`x` is none of neurons, controls"),
        (("tokens", "T", "--min-count", 0), "Invalid value for"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
)
def test_usage_errors_are_status_2_and_name_what_is_wrong(
    arguments: tuple[object, ...],
    text: str,
    run: Run,
    trace_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*(trace_path if a == "T" else a for a in arguments))
    assert done.exit_code == 2, done.output
    assert text in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())


def test_a_file_that_can_not_be_written_is_status_4(run: Run, trace_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run("export", trace_path, tmp_path / "file").exit_code == 4


def test_a_fault_is_status_70_without_a_traceback(run: Run, trace_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("as if")

    monkeypatch.setattr("lightning_gradtrace.analysis.outliers", broken)
    done = run("outliers", trace_path)
    assert done.exit_code == 70
    assert done.stderr.startswith("gradtrace: unexpected TypeError: as if\n") and "GRADTRACE_TRACEBACK=1" in done.stderr


def test_a_reader_that_stops_early_is_no_error(trace_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_gradtrace", "outliers", str(trace_path), "--of", "entry", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


HEAVY = ("torch", "lightning", "pandas", "zarr", "matplotlib")


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [(["--help"], HEAVY), (["tokens", "--help"], HEAVY), (["neurons", "T"], ("torch", "lightning", "matplotlib"))],
)
def test_commands_import_what_they_need_only(arguments: list[str], unwanted: tuple[str, ...], trace_path: Path) -> None:
    given = [str(trace_path) if a == "T" else a for a in arguments]
    code = (
        "import sys\nfrom lightning_gradtrace.cli import app\n"
        f"try: app({given!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"print(*sorted(set({unwanted!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
