"""Collected runs: small files only, claims by seed, and errors that say which run is meant."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf

from examples.mechanisms.collect import by_seed, collect, find_runs, main
from examples.mechanisms.study import Claim, claim_table


def make_run(folder: Path, seed: int, found: float, name: str = "toy") -> Path:
    control = folder / "without"
    (folder / "trace.zarr").mkdir(parents=True)
    (folder / "trace.zarr" / "zarr.json").write_text("{}")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("a: 1")
    control.mkdir()
    for path in (folder, control):
        OmegaConf.save(OmegaConf.create({"name": name, "seed": seed}), path / "config.yaml")
        (path / "measures.csv").write_text("step,measure,value\n0,loss,1.0\n")
        (path / "model.pt").write_bytes(b"weights")
    (folder / "figure.png").write_bytes(b"p" * 500)
    claims = [Claim(f"score at step {seed}", found, ">=", 0.5), Claim("chance", 0.25, "<", 0.3)]
    claim_table(claims).to_csv(folder / "claims.csv", index=False)
    return folder


def test_what_is_small_comes_along_and_the_claims_of_all_seeds_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "multi" / "0", 3, 0.75)
    make_run(tmp_path / "multi" / "1", 4, 0.125)
    out = tmp_path / "out"
    main([str(tmp_path / "multi"), "--out", str(out)])
    files = sorted(str(path.relative_to(out / "toy" / "seed_4")) for path in (out / "toy" / "seed_4").rglob("*.*"))
    assert files == [
        "claims.csv",
        "config.yaml",
        "figure.png",
        "measures.csv",
        "without/config.yaml",
        "without/measures.csv",
    ]
    claims = pd.read_csv(out / "claims.csv")
    assert claims[["seed", "claim", "holds"]].to_numpy().tolist() == [
        [3, 1, True],
        [3, 2, True],
        [4, 1, False],
        [4, 2, True],
    ]
    table = (out / "claims.md").read_text()
    assert "| score at step 3 | >= 0.5 | 0.75 | **0.125** |" in table
    assert "| chance | < 0.3 | 0.25 | 0.25 |" in table
    assert table in capsys.readouterr().out


def test_a_seed_without_a_claim_leaves_its_cell_empty(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 0, 0.75), make_run(tmp_path / "b", 1, 0.75)]
    pd.read_csv(runs[1] / "claims.csv").head(1).to_csv(runs[1] / "claims.csv", index=False)
    assert "| chance | < 0.3 | 0.25 |  |" in by_seed(collect(runs, tmp_path / "out")[0])


def test_large_files_are_named_and_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0, 0.75)
    _, left_out = collect([run], tmp_path / "out", max_bytes=499)
    assert left_out == [run / "figure.png"]
    assert not (tmp_path / "out" / "toy" / "seed_0" / "figure.png").exists()


def test_runs_that_are_not_finished_or_there_twice_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a" / "first", 0, 0.75)
    assert find_runs([tmp_path / "a", run]) == [run]
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"b` holds no finished run: no `claims.csv`"):
        find_runs([tmp_path / "b"])
    again = make_run(tmp_path / "a" / "second", 0, 0.75)
    with pytest.raises(ValueError, match="are both runs of `toy` with seed 0; pass one of them"):
        collect([run, again], tmp_path / "out")
