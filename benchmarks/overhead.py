"""What recording costs: plain training, GradTrace, and two other ways to per-sample gradients, side by side.

    python -m benchmarks.overhead --text wiki.valid.tokens --rounds 7 --steps 25

Workload A is the reference experiment (docs/results/wikitext2.md): batch 20 x 35, vocabulary 28,782. All variants
train the same model on the same batches in one process. They take turns in short blocks, and the order changes from
round to round, so that other load on the machine falls on all of them. A block is timed from its third step to its
end; for GradTrace the end is when the trace is closed on disk. Reported are medians over the rounds and the median of
the ratios within a round.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from examples.models import LanguageModel
from lightning_gradtrace import GradTrace, TopK

VOCABULARY, BATCH, CONTEXT, CLIP = 28_782, 20, 35, 0.5
WARM_UP = 2


class Columns(Dataset[tuple[Tensor, Tensor]]):
    """The text of the reference layout: item ``i * 20 + b`` is column b of batch i."""

    def __init__(self, ids: Tensor) -> None:
        self.columns = ids[: len(ids) // BATCH * BATCH].view(BATCH, -1)

    def __len__(self) -> int:
        return BATCH * ((self.columns.shape[1] - 1) // CONTEXT)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        step, column = divmod(item, BATCH)
        part = self.columns[column, step * CONTEXT : (step + 1) * CONTEXT + 1]
        return part[:-1], part[1:]


def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack items position first."""
    tokens, targets = zip(*items, strict=True)
    return torch.stack(tokens, 1), torch.stack(targets, 1)


def read_ids(text: Path | None) -> Tensor:
    """Return token ids below the vocabulary's size: of a text, or Zipf-distributed without one."""
    if text is None:
        ranks = torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
        return torch.multinomial(1 / ranks, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    words = text.read_text(encoding="utf-8").lower().split()
    numbers = {word: i % VOCABULARY for i, word in enumerate(dict.fromkeys(words))}
    return torch.tensor([numbers[word] for word in words])


class Clock(pl.Callback):
    """Times a fit from its third step to the end of the training."""

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == WARM_UP:
            self.started = time.perf_counter()

    @override
    def on_train_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.seconds = (time.perf_counter() - self.started) / (trainer.global_step - WARM_UP)


class Peer(LanguageModel):
    """Takes its steps by hand: per-sample gradients of all parameters, their sum, clipping, SGD. Keeps nothing."""

    def __init__(self, gradients: Callable[[Peer, Tensor, Tensor], dict[str, Tensor]]) -> None:
        super().__init__(VOCABULARY)
        self.automatic_optimization = False
        self._gradients = gradients

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        tokens, targets = batch
        for name, gradient in self._gradients(self, tokens, targets).items():
            self.get_parameter(name).grad = gradient.sum(0)
        torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP)
        self.optimizers().step()  # type: ignore[union-attr]


def whole_model_vmap(model: Peer, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients by torch.func: vmap(grad) of the whole model."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (values, buffers), (x.unsqueeze(1),))
        return F.cross_entropy(logits.flatten(0, 1), y) / tokens.shape[1]

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 1), randomness="different")
    return gradient(parameters, tokens, targets)  # type: ignore[no-any-return]


def loop_of_backwards(model: Peer, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients by one forward and backward pass for every sample."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = []
    for b in range(tokens.shape[1]):
        logits = model(tokens[:, b : b + 1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, b]) / tokens.shape[1]
        rows.append(torch.autograd.grad(loss, parameters))
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def fit(
    model: pl.LightningModule, callbacks: list[pl.Callback], data: Dataset[tuple[Tensor, Tensor]], steps: int
) -> float:
    """Train for some steps and return the seconds per step after the warm-up."""
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=steps + WARM_UP,
        gradient_clip_val=CLIP if model.automatic_optimization else None,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, clock],
    )
    trainer.fit(model, DataLoader(data, batch_size=BATCH, collate_fn=collate))
    return clock.seconds


def variants(folder: Path) -> dict[str, Callable[[], tuple[pl.LightningModule, list[pl.Callback]]]]:
    """Return what is compared: makers of a model and its callbacks, by name."""

    def traced(*records: TopK) -> tuple[pl.LightningModule, list[pl.Callback]]:
        target = folder / f"{time.monotonic_ns()}.zarr"
        return LanguageModel(VOCABULARY), [GradTrace(target, list(records))]

    return {
        "plain": lambda: (LanguageModel(VOCABULARY), []),
        "GradTrace, TopK(1000)": lambda: traced(TopK(1000)),
        "GradTrace, TopK(20000, per='step')": lambda: traced(TopK(20_000, per="step")),
        "whole-model vmap(grad), capture only": lambda: (Peer(whole_model_vmap), []),
        "B backward passes, capture only": lambda: (Peer(loop_of_backwards), []),
    }


def measure(text: Path | None, rounds: int, steps: int, only: str | None) -> pd.DataFrame:
    """Return seconds per step, one row per round, one column per variant."""
    data = Columns(read_ids(text))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = {n: make for n, make in variants(Path(folder)).items() if only is None or n == "plain" or only in n}
        for number in range(rounds + 1):
            order = list(made)[number % len(made) :] + list(made)[: number % len(made)]
            row = {}
            for name in order:
                pl.seed_everything(1111, verbose=False)
                # The peers keep all per-sample gradients of 12 million parameters at once; a few steps tell.
                row[name] = fit(*made[name](), data, steps if "capture only" not in name else max(2, steps // 8))
            if number:  # the first round warms up caches and threads
                rows.append(row)
                print("  ".join(f"{name}: {row[name]:.3f}" for name in made), flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="text file of the batches; without it, Zipf-distributed tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25, help="steps per block")
    parser.add_argument("--only", help="besides plain training, only variants whose name contains this")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    seconds = measure(arguments.text, arguments.rounds, arguments.steps, arguments.only)
    ratios = seconds.div(seconds["plain"], axis=0)
    table = pd.DataFrame({"seconds per step": seconds.median(), "x plain": ratios.median()})
    table["x plain, lowest"], table["x plain, highest"] = ratios.min(), ratios.max()
    print(
        f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{arguments.rounds} rounds of {arguments.steps} steps, medians\n")
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
