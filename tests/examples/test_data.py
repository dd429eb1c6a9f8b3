"""Layout of the batches, splits, and what the data modules say when data is missing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.data import EnglishData, PlantedData, WikiText2Data
from examples.data.base import TextDataModule
from examples.data.columns import ColumnDataset

LINES = [f"line {i} of a small text , which has some words" for i in range(40)]


class LinesData(TextDataModule):
    """Forty short lines."""

    def lines(self) -> dict[str, list[str]]:
        return {"train": LINES, "val": LINES[:10]}


def set_up(data: TextDataModule) -> TextDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def words(data: TextDataModule, split: str) -> list[str]:
    return [data.vocabulary.words[n] for n in data.datasets[split].columns.flatten().tolist()]


def test_batches_are_those_of_the_reference_batchify() -> None:
    data = set_up(LinesData(batch_size=4, context=7))
    text = data.vocabulary.encode(token for line in LINES for token in line.split())
    n_rows = len(text) // 4
    reference = torch.from_numpy(text[: n_rows * 4]).view(4, -1).t()  # (row, column), as in the published code
    batches = list(data.train_dataloader())
    assert len(batches) == -(-(n_rows - 1) // 7)
    for i, (tokens, targets) in enumerate(batches):
        stop = min(7 * (i + 1), n_rows - 1)
        assert torch.equal(tokens, reference[7 * i : stop])
        assert torch.equal(targets, reference[7 * i + 1 : stop + 1])


def test_last_batch_is_shorter_for_all_columns_and_left_out_when_shuffled() -> None:
    data = set_up(LinesData(batch_size=4, context=7))
    batches = list(data.train_dataloader())
    assert {tokens.shape[0] for tokens, _ in batches[:-1]} == {7}
    assert 0 < batches[-1][0].shape[0] < 7
    shuffled = set_up(LinesData(batch_size=4, context=7, shuffle=True))
    assert len(shuffled.datasets["train"]) == len(data.datasets["train"]) - 4
    assert {tokens.shape for tokens, _ in shuffled.train_dataloader()} == {(7, 4)}
    assert len(shuffled.datasets["val"]) == len(data.datasets["val"])


def test_item_number_says_batch_and_column() -> None:
    data = set_up(LinesData(batch_size=4, context=7))
    batches = list(data.train_dataloader())
    for item in (0, 5, len(data.datasets["train"]) - 1):
        tokens, targets = data.datasets["train"][item]
        assert torch.equal(tokens, batches[item // 4][0][:, item % 4])
        assert torch.equal(targets, batches[item // 4][1][:, item % 4])
    with pytest.raises(IndexError, match="of a data set of"):
        data.datasets["train"][len(data.datasets["train"])]


def test_workers_load_the_same_batches() -> None:
    plain, loaded = (set_up(LinesData(batch_size=4, context=7, num_workers=n)) for n in (0, 1))
    for (a, b), (c, d) in zip(plain.train_dataloader(), loaded.train_dataloader(), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_text_too_short_for_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="use a longer text, a smaller batch or a shorter context"):
        ColumnDataset(torch.arange(5), n_columns=4, context=3)
    with pytest.raises(ValueError, match="expected at least 4 tokens in each"):
        ColumnDataset(torch.arange(12), n_columns=4, context=3, whole=True)


def test_missing_test_split_is_named() -> None:
    with pytest.raises(ValueError, match="has the splits `train`, `val`, expected one named `test`"):
        set_up(LinesData()).test_dataloader()


def test_english_holds_out_every_tenth_paragraph_and_takes_its_words_from_the_rest() -> None:
    data = EnglishData(min_count=2)
    lines = data.lines()
    total = len(lines["train"]) + len(lines["val"])
    assert len(lines["val"]) == total // 10
    assert sum(len(line.split()) for split in lines.values() for line in split) > 50_000
    set_up(data)
    again = set_up(EnglishData(min_count=2))
    assert data.vocabulary.words == again.vocabulary.words
    assert "statement" in data.vocabulary.words
    assert not any("*" in word or "`" in word for word in data.vocabulary.words)


def test_planted_samples_hold_words_of_their_topic_alone() -> None:
    data, again = (
        set_up(PlantedData(n_documents=40, contexts_per_document=2, batch_size=10, context=20)) for _ in range(2)
    )
    topic_of = {word: topic for topic, own in data.topics.items() for word in own}
    assert set(topic_of) <= set(data.vocabulary.words)
    seen = set()
    for item in range(len(data.datasets["train"])):
        sample = [data.vocabulary.words[n] for n in data.datasets["train"][item][0].tolist()]
        found = {topic_of[word] for word in sample if word in topic_of}
        assert found <= {data.topic_of(item)}
        seen |= found
    assert seen == set(data.topics)
    assert words(data, "train") == words(again, "train")


def write_splits(folder: Path, **files: int) -> Path:
    for name, n_lines in files.items():
        text = "".join(f"{name} line {i} has these few words in it\n" for i in range(n_lines))
        (folder / f"{name.replace('_', '.')}").write_text(text)
    return folder


@pytest.mark.parametrize("pattern", ["{}_txt", "wiki_{}_tokens"])
def test_wikitext2_takes_three_local_splits(tmp_path: Path, pattern: str) -> None:
    sizes = {"train": 30, "valid": 20, "test": 10}
    root = write_splits(tmp_path, **{pattern.format(name): n for name, n in sizes.items()})
    data = set_up(WikiText2Data(root=str(root), batch_size=2, context=5, eval_batch_size=2))
    assert {split: len(lines) for split, lines in data.lines().items()} == {"train": 30, "val": 20, "test": 10}
    assert len(list(data.test_dataloader())) > 0


def test_wikitext2_holds_out_the_last_tenth_of_two_splits(tmp_path: Path) -> None:
    lines = WikiText2Data(root=str(write_splits(tmp_path, valid_txt=25, test_txt=20))).lines()
    assert list(lines) == ["train", "val"]
    assert (len(lines["train"]), len(lines["val"])) == (41, 4)
    assert lines["val"][-1].startswith("test_txt line 19")


def test_wikitext2_names_what_a_wrong_root_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match=r"`data.root` is .*holds \['notes.md'\], expected `wiki.train.tokens`"):
        WikiText2Data(root=str(tmp_path)).lines()
    with pytest.raises(FileNotFoundError, match="no such directory"):
        WikiText2Data(root=str(tmp_path / "absent")).lines()


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_wikitext2_without_root_downloads_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: str) -> dict[str, dict[str, list[str]]]:
        asked.append(names)
        return {split: {"text": LINES} for split in ("train", "validation", "test")}

    fake_datasets(monkeypatch, load)
    data = set_up(WikiText2Data(batch_size=2, context=5))
    assert set(data.datasets) == {"train", "val", "test"}
    assert set(asked) == {("Salesforce/wikitext", "wikitext-2-v1")}


def test_wikitext2_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: str) -> None:
        raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub\nlong details")

    fake_datasets(monkeypatch, load)
    with pytest.raises(ConnectionError) as caught:
        WikiText2Data().prepare_data()
    assert "could not be downloaded and is not in the cache (ConnectionError: Couldn't reach" in str(caught.value)
    assert "point `data.root` at a directory with the files" in str(caught.value)
    assert "long details" not in str(caught.value)


def test_wikitext2_without_the_datasets_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-gradtrace\[data\]'.*point `data.root` at local"):
        WikiText2Data().prepare_data()
