"""How-to recipes and the gallery run, the command reference is that of the help, and the site builds strictly."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from lightning_gradtrace import report
from tests.analysis.traces import write_trace
from tests.cli.conftest import trace_path as trace_path
from tests.docs.command_reference import MARK, reference
from tests.docs.command_reference import PAGE as COMMANDS
from tests.docs.pages import ROOT, between, blocks
from tests.examples.conftest import Run

RECIPES = sorted(file.relative_to(ROOT).as_posix() for file in ROOT.glob("docs/how-to/*.md"))
PAGES = sorted(file.relative_to(ROOT).as_posix() for file in ROOT.glob("docs/**/*.md"))


def write_heads(path: Path) -> None:
    """Write a trace of the queries and keys of two heads, with weights before and after its twelve steps."""
    rng = np.random.default_rng(0)
    shapes = {f"attention.W_{part}": (2, 4, 2) for part in "QK"}
    index = np.stack([np.sort(rng.permutation(32)[:4]) for _ in range(120)])
    text = {sample: rng.integers(0, 9, 10).tolist() for sample in range(20)}
    weights = {step: {name: rng.normal(size=shape) for name, shape in shapes.items()} for step in (0, 12)}
    sample_id = np.stack([rng.permutation(20)[:10] for _ in range(12)])
    write_trace(shapes, sample_id, index, shift=rng.normal(size=(120, 4)), text=text, weights=weights, to=path)


@pytest.fixture
def runs(trace_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `runs/a.zarr` and `runs/heads.zarr`, as the pages suppose."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.zarr").symlink_to(trace_path)
    write_heads(tmp_path / "runs" / "heads.zarr")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RECIPES)
def test_a_recipe_runs(page: str, runs: Path) -> None:
    found = blocks(page, name="how-to")
    assert found, f"{page} has no recipe"
    namespace: dict = {}
    for block in found:
        block.run(namespace)


def test_the_gallery_draws_every_picture_that_it_shows(
    run_experiment: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "docs/gallery.md"
    (block,) = blocks(page, "bash", "train")
    (given,) = (word for word in shlex.split(block.text) if word.startswith("experiment="))
    small = ("data.n_documents=240", "trainer.max_epochs=3")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "planted").symlink_to(run_experiment(given.partition("=")[2], *small))
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"\]\(images/([\w-]+\.png)\)", (ROOT / page).read_text(encoding="utf-8"))
    namespace: dict = {}
    for block in blocks(page, name="gallery"):
        block.run(namespace)
    assert sorted(file.name for file in tmp_path.glob("*.png")) == sorted(shown)
    drawn = {name for name in vars(report) if name.startswith("plot_")}
    assert drawn == set(re.findall(r"report\.(plot_\w+)", (ROOT / page).read_text(encoding="utf-8")))
    assert all((ROOT / "docs" / "images" / name).stat().st_size < 60_000 for name in shown)


def test_the_command_reference_is_the_help_of_the_commands() -> None:
    assert between(COMMANDS, MARK) == reference(), "run `python -m tests.docs.command_reference`"


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_commands_on_a_page_have_the_options_that_it_names(page: str) -> None:
    from lightning_gradtrace.cli import app

    group = get_command(app)
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "gradtrace" not in {Path(word).name for word in words[:1]}:
                continue
            command = group.get_command(None, words[1])  # type: ignore[attr-defined,arg-type]
            assert command is not None, f"{page}: `{line}`"
            known = {option for parameter in command.params for option in parameter.opts}
            for word in words[2:]:
                assert not word.startswith("-") or word in known, f"{page}: `{line}` has no option `{word}`"


def test_every_page_is_in_the_navigation_and_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "fonts.googleapis" not in index and "google-analytics" not in index
    for page in PAGES:
        name = page.removeprefix("docs/").removesuffix(".md")
        assert name == "index" or f'href="{name}/"' in index, f"{page} is not in the navigation"
    loaded = re.findall(r'(?:src|<link rel="stylesheet" href)="(https?://[^"]+)"', index)
    assert loaded == []
