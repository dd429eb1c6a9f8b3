"""The README's example runs, and links and paths on every page lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import pytest

from examples.data import PlantedData
from examples.models import LanguageModel
from lightning_gradtrace.update import UpdateRule
from lightning_gradtrace.update._registry import _subclasses
from tests.docs.pages import ROOT, blocks

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f.relative_to(ROOT).as_posix() for f in ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_example_records_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    L.seed_everything(0, verbose=False)
    data = PlantedData(batch_size=20, context=12, n_documents=60)
    data.setup()
    model = LanguageModel(len(data.vocabulary), width=16, n_heads=2, hidden=16, n_layers=1, dropout=0.1)
    (block,) = blocks("README.md")
    assert len([line for line in block.text.splitlines() if line.strip()]) <= 10
    page = block.run({"model": model, "data": data})
    shown = capsys.readouterr().out
    assert "12 steps" in shown and "no problems" in shown
    assert "network.encoder.layers.0.self_attn.in_proj_weight" in shown
    assert page["trace"].attrs["complete"]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to `{target}`, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page} links to `{target}#{anchor}`, which has no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_backticks_exist(page: str) -> None:
    """Only paths that begin with a folder of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|conf|examples|benchmarks|docs|lightning_gradtrace)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"{page} names `{path}`, which does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_every_python_example_is_run(page: str) -> None:
    """A Python block belongs to an example; one line may show a call without being one."""
    for block in blocks(page):
        assert block.name or len(block.text.splitlines()) == 1, f"{page}, line {block.line}: the block has no example"


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md"])
def test_pages_name_every_optimizer_with_a_rule(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    families = [c for c in _subclasses(UpdateRule) if c.__module__.startswith("lightning_gradtrace.")]
    for name in (optimizer.__name__ for family in families for optimizer in family.optimizers):
        assert f"`{name}`" in text or f"`torch.optim.{name}`" in text, f"{page} doesn't name `{name}`"
