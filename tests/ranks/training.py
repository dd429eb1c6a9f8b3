"""Trainings of two ranks, and the same trainings by one process on the same global batches."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_gradtrace import Dense, Factored, GradTrace, Norms, Sketch, TokenGrads, TopK
from lightning_gradtrace.capture.placing.placement import Placer
from lightning_gradtrace.record.gains import Gains
from tests.test_callback import LENGTH, N_SAMPLES, VOCAB, Model, Sentences

BATCH, EPOCHS, RANKS, SEED = 5, 2, 2, 3


class Joint(Model):
    """One process that trains as several ranks do: its loss is the mean of the losses of their parts of a batch."""

    def __init__(self, sizes: dict[int, list[int]] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.sizes = sizes

    def training_step(self, batch, batch_idx):
        x, y = batch
        sizes = [len(x) // RANKS] * RANKS if self.sizes is None else self.sizes[batch_idx]
        self.first = torch.tensor([sum(sizes[:rank]) for rank, n in enumerate(sizes) for _ in range(n)])
        weight = torch.tensor([1 / (RANKS * n) for n in sizes for _ in range(n)])
        losses = F.cross_entropy(self(x).transpose(1, 2), y, reduction="none").mean(1)
        return losses @ weight


class Branches(Model):
    """Three layers, of which a batch uses one or none: the loss does not reach every parameter on every rank."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.branches = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, tokens):
        return self.head(self.branches[int(tokens[0, 0]) % 2](self.hidden(tokens)))

    def hidden(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.encoder(self.embedding(tokens), mask, is_causal=True)


class JointBranches(Joint, Branches):
    def forward(self, tokens):
        hidden = self.hidden(tokens)
        odd = (tokens[self.first, 0] % 2 == 1)[:, None, None]
        return self.head(torch.where(odd, self.branches[1](hidden), self.branches[0](hidden)))


class Adam(Model):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


class Descent(Model):
    """Moves all parameters."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


class HalfBranches(Branches, Descent):
    """Casts by itself. Of a parameter that the samples of one rank don't reach, that rank sees no cast."""

    def training_step(self, batch, batch_idx):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().training_step(batch, batch_idx)


class SingleBranches(Branches, Descent):
    """In double precision but for the layers of which a batch uses one."""

    def forward(self, tokens):
        hidden, branch = self.hidden(tokens), self.branches[int(tokens[0, 0]) % 2]
        return self.head(F.linear(hidden.float(), branch.weight.float(), branch.bias.float()).double())


class JointAdam(Joint, Adam):
    pass


class Sharded(Model):
    """Every layer sharded by itself, the rest together: FSDP2."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)


class ShardedAdam(Sharded, Adam):
    pass


class Resharded(ShardedAdam):
    """The outermost module, too, frees its parameters after its forward pass; layers are checkpointed from outside."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for module in (*self.encoder.layers, self):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.embedding(tokens)
        for layer in self.encoder.layers:
            hidden = checkpoint(layer, hidden, mask, is_causal=True, use_reentrant=False)
        return self.head(hidden)


class Kept(Sharded):
    """No module frees its parameters after its forward pass; layers are checkpointed inside."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.encoder.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        for module in (*self.encoder.layers, self):
            fully_shard(module, mesh=mesh, reshard_after_forward=False)


class JointBranchesAdam(JointBranches, Adam):
    pass


class ShardedBranches(Sharded, Branches, Adam):
    """The loss tokens of a batch depend on one branch; the loss on two, as FSDP2 wants it."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for module in (*self.encoder.layers, self):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def forward(self, tokens):
        used = int(tokens[0, 0]) % 2
        hidden = self.hidden(tokens)
        return self.head(self.branches[used](hidden)), self.branches[1 - used](hidden)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits, other = self(x)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0 * other.sum()


class Square(Model):
    """Needs the probe only for as many samples as a sentence has tokens: a bare table of positions."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.places = nn.Parameter(torch.randn(LENGTH, 8))

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embedding(tokens) + self.places, mask, is_causal=True))


class JointSquare(Joint, Square):
    pass


class ShardedSquare(Sharded, Square):
    pass


class Drawn(Model):
    """Draws a time for each sample, and as many words for all of them as a rank has samples."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.time = nn.Linear(1, 8)
        self.generator = torch.Generator().manual_seed(SEED)

    def forward(self, batch: Any, times: torch.Tensor) -> torch.Tensor:
        x, y = batch
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.embedding(x) + self.time(times)[:, None]
        hidden = self.encoder(hidden, mask, is_causal=True)
        words = self.embedding(torch.randint(VOCAB, (BATCH,), generator=self.generator))
        return F.cross_entropy(self.head(hidden).transpose(1, 2), y, reduction="none").mean(1) + (
            hidden.mean(1) @ words.T
        ).logsumexp(1)

    def draw(self, n_samples: int) -> torch.Tensor:
        return torch.rand(n_samples, 1, generator=self.generator)

    def training_step(self, batch, batch_idx):
        return self(batch, self.draw(len(batch[0]))).mean()


class JointDrawn(Drawn):
    """All ranks draw the same."""

    def __init__(self, sizes: None = None, **settings: Any) -> None:
        super().__init__(**settings)

    def training_step(self, batch, batch_idx):
        return self(batch, torch.cat([self.draw(len(batch[0]) // RANKS)] * RANKS)).mean()


class ShardedDrawn(Sharded, Drawn):
    pass


class Reentrant(Sharded):
    """Layers are checkpointed in the form that runs a backward pass inside of the backward pass."""

    def forward(self, tokens):
        return self.head(checkpoint(self.encoder, self.embedding(tokens), use_reentrant=True))


class Halved(Sharded):
    """Every module gathers its parameters in bfloat16; the Trainer knows nothing of it."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in self.encoder.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self, mesh=mesh, mp_policy=dataclasses.replace(policy, output_dtype=torch.float32))


class Collecting(Model):
    """Several micro-batches make a step, by manual optimization; the last step of an epoch has fewer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        last = batch_idx % 2 == 1 or batch_idx == self.trainer.num_training_batches - 1
        self.collect(last)
        self.manual_backward(super().training_step(batch, batch_idx))
        if last:
            self.optimizers().step()
            self.optimizers().zero_grad()

    def collect(self, last: bool) -> None:
        """Prepare a micro-batch, which is the last of a step or not."""


class JointCollecting(Collecting, JointAdam):
    pass


class ShardedCollecting(Collecting, ShardedAdam):
    """Gradients stay whole until the last micro-batch of a step."""

    def collect(self, last: bool) -> None:
        self.set_requires_gradient_sync(last)


class SquareCollecting(ShardedCollecting, Square):
    pass


class JointSquareCollecting(JointCollecting, Square):
    pass


class KeptCollecting(ShardedCollecting):
    """Weights stay whole as well. What waits is not zeroed with the gradients."""

    def collect(self, last: bool) -> None:
        super().collect(last)
        self.set_reshard_after_backward(last)
        self.optimizers().zero_grad()


class PartlyCollecting(ShardedCollecting):
    """One layer reduces its gradients after every micro-batch."""

    def collect(self, last: bool) -> None:
        super().collect(last)
        self.encoder.layers[0].set_requires_gradient_sync(True)


class HalvedCollecting(Collecting, Halved):
    """What waits is in another precision than what a pass adds to it."""

    def collect(self, last: bool) -> None:
        self.set_requires_gradient_sync(last)


class Whole(Model):
    """A model that forgets to shard itself."""

    def configure_model(self):
        pass


class Listed(BatchSampler):
    """Given batches in a given order."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Epochs(BatchSampler):
    """Other batches in every epoch."""

    def __init__(self, epochs: list[list[list[int]]]) -> None:
        self.epochs, self.number = epochs, -1

    def __iter__(self) -> Iterator[list[int]]:
        self.number += 1
        return iter(self.epochs[self.number])

    def __len__(self) -> int:
        return len(self.epochs[0])


def of_ranks(epoch: int) -> list[list[list[int]]]:
    """Batches of every rank as Lightning's DistributedSampler draws them."""
    found = []
    for rank in range(RANKS):
        sampler = DistributedSampler(range(N_SAMPLES), RANKS, rank, shuffle=True, seed=SEED)
        sampler.set_epoch(epoch)
        order = list(sampler)
        found.append([order[i : i + BATCH] for i in range(0, len(order), BATCH)])
    return found


def joined(epoch: int) -> list[list[int]]:
    """Global batches: those of rank 0, then those of rank 1."""
    return [[i for part in parts for i in part] for parts in zip(*of_ranks(epoch), strict=True)]


def trace_callback(path: Path, **options: Any) -> GradTrace:
    records = [TopK(11), TopK(17, per="step"), Dense(), Factored(schedule=2), Norms(), Sketch(5), Gains()]
    tokens = options.pop("tokens", None)
    if tokens is not None:
        records.append(TokenGrads(**{"tokens": list(range(6)), "k": 9, "slots": 3, **tokens}))
    return GradTrace(path, records, **{"ledger_every_n_steps": 2, "weights_every_n_steps": 3, **options})


def fit(
    model: pl.LightningModule,
    *callbacks: pl.Callback,
    loader: Any = None,
    strategy: Any = "auto",
    n_ranks: int = RANKS,
    **options: Any,
) -> pl.Trainer:
    """Train as one process, or as the rank that the environment says this one is."""
    settings = {"max_epochs": EPOCHS, "gradient_clip_val": 0.3, "enable_checkpointing": False, **options}
    resume = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else n_ranks,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        trainer.fit(model, DataLoader(Sentences(), BATCH, shuffle=True) if loader is None else loader, ckpt_path=resume)
    return trainer


def make(kind: type[Model], **settings: Any) -> Model:
    pl.seed_everything(SEED, verbose=False)  # the seed of Lightning's DistributedSampler too
    return kind(**{"dropout": 0.0, "momentum": 0.9, **settings})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- what the ranks do ---------------------------------------------------------------------------------------------


def ddp(folder: Path, name: str, kind: type[Model], ddp_options: dict[str, Any], options: dict[str, Any]) -> Any:
    """Train with and without the callback; the weights of both."""
    found = []
    for callbacks in ([trace_callback(folder / f"{name}.zarr", **options.get("trace", {}))], []):
        model = make(kind, **options.get("model", {}))
        strategy = DDPStrategy(process_group_backend="gloo", **ddp_options)
        fit(model, *callbacks, strategy=strategy, loader=_loader(options), **options.get("trainer", {}))
        found.append({name: w.numpy() for name, w in weights(model).items()})
    return found


def fsdp(folder: Path, name: str, kind: type[Model], options: dict[str, Any]) -> Any:
    """Train with and without the callback; the weights of both."""
    if "precision" not in options.get("trainer", {}):
        torch.set_default_dtype(torch.float64)  # the strategy knows no precision="64-true"
    n_ranks, found = options.get("ranks", RANKS), []
    for callbacks in ([trace_callback(folder / f"{name}.zarr", **options.get("trace", {}))], []):
        model = make(kind, **options.get("model", {}))
        strategy = ModelParallelStrategy(n_ranks, 1, process_group_backend="gloo")
        # Without a memory the probe runs after every backward pass, between gradients that wait as well.
        forgetful = mock.patch.object(Placer, "_remembered", lambda *_: None)
        with forgetful if options.get("asks") else nullcontext():
            fit(
                model,
                *callbacks,
                strategy=strategy,
                n_ranks=n_ranks,
                loader=_loader(options),
                **options.get("trainer", {}),
            )
        found.append({name: w.full_tensor().numpy() for name, w in weights(model).items()})
    return found


def refused(folder: Path, kind: type[Model], trace: dict[str, Any]) -> Any:
    """Train with a callback that refuses to."""
    try:
        strategy = ModelParallelStrategy(RANKS, 1, process_group_backend="gloo")
        fit(make(kind), trace_callback(folder / "refused.zarr", **trace), strategy=strategy)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _loader(options: dict[str, Any]) -> Any:
    batches = options.get("batches")
    return None if batches is None else DataLoader(Sentences(), batch_sampler=Listed(batches[int(os.environ["RANK"])]))


def single(folder: Path, name: str, kind: type[Model], options: dict[str, Any], double: bool = False) -> Any:
    """Train as one process on the same global batches; the weights."""
    if double:
        torch.set_default_dtype(torch.float64)
    batches = options.get("batches")
    if batches is None:
        loader = DataLoader(Sentences(), batch_sampler=Epochs([joined(epoch) for epoch in range(EPOCHS)]))
        sizes = None
    else:
        pairs = list(zip(*batches, strict=True))
        loader = DataLoader(Sentences(), batch_sampler=Listed([a + b for a, b in pairs]))
        sizes = {i: [len(a), len(b)] for i, (a, b) in enumerate(pairs)}
    model = make(kind, sizes=sizes, **options.get("model", {}))
    trace = trace_callback(folder / f"{name}-single.zarr", **options.get("trace", {}))
    fit(model, trace, loader=loader, **options.get("trainer", {}))
    return {name: w.numpy() for name, w in weights(model).items()}
