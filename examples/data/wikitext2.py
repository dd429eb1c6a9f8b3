"""WikiText-2 from local files, or downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from examples.data.base import TextDataModule

_NAMES = {"train": "train", "val": "valid", "test": "test"}
_HUB = ("Salesforce/wikitext", "wikitext-2-v1")


class WikiText2Data(TextDataModule):
    """WikiText-2 (Merity et al., 2016, CC BY-SA 3.0).

    With `root`, the files `train`, `valid` and `test` there, named `wiki.train.tokens` or `train.txt`. Where only the
    validation and the test file are there, they are the training text, and the last tenth of their lines is held out
    for validation. Without `root`, the `datasets` library downloads all three.

    Args:
        root: directory with the files, or None to download.
        **options: see `TextDataModule`.
    """

    def __init__(self, root: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = root

    @override
    def prepare_data(self) -> None:
        """Download the text if there is no `root`, in one process only."""
        if self.root is None:
            download()

    @override
    def lines(self) -> dict[str, list[str]]:
        """Return the lines of each split."""
        return download() if self.root is None else read_root(Path(self.root).expanduser())


def read_root(root: Path) -> dict[str, list[str]]:
    """Read the splits from files.

    Args:
        root: directory with the files.

    Raises:
        FileNotFoundError: if neither all three files nor the two smaller ones are there.
    """
    texts = {}
    for split, name in _NAMES.items():
        file = next((f for f in (root / f"wiki.{name}.tokens", root / f"{name}.txt") if f.is_file()), None)
        if file is not None:
            texts[split] = file.read_text(encoding="utf-8").splitlines()
    if set(texts) == set(_NAMES):
        return texts
    if set(texts) == {"val", "test"}:
        lines = texts["val"] + texts["test"]
        n_train = len(lines) - len(lines) // 10
        return {"train": lines[:n_train], "val": lines[n_train:]}
    found = sorted(f.name for f in root.iterdir())[:10] if root.is_dir() else "no such directory"
    raise FileNotFoundError(
        f"`data.root` is `{root}` and holds {found}, expected `wiki.train.tokens`, `wiki.valid.tokens` and "
        "`wiki.test.tokens` (or `train.txt`, `valid.txt`, `test.txt`), or the last two of them; "
        "give the directory of the files, or leave `data.root` out to download them"
    )


def download() -> dict[str, list[str]]:
    """Load the splits through the `datasets` library, which keeps them in its cache.

    Raises:
        ImportError: if the library is not installed.
        ConnectionError: if the text is neither in the cache nor to be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "downloading WikiText-2 needs the `datasets` library, which is not installed: "
            "`pip install 'lightning-gradtrace[data]'`, or point `data.root` at local files"
        ) from error
    try:
        splits = load_dataset(*_HUB)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"WikiText-2 (`{_HUB[0]}`, `{_HUB[1]}`) could not be downloaded and is not in the cache "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
            "connect to the network, or point `data.root` at a directory with the files"
        ) from error
    return {"train": splits["train"]["text"], "val": splits["validation"]["text"], "test": splits["test"]["text"]}
