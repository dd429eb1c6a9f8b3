"""Passes of loss tokens between backward passes that FSDP2 does not reduce, without a Trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_gradtrace.capture.engines.loss_tokens import TokenChoice, TokenEngine
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from lightning_gradtrace.capture.sharded import bring_to_rest, watch_unsharding
from lightning_gradtrace.ranks.meeting import Ranks
from lightning_gradtrace.ranks.passing import pass_together
from tests.ranks.training import make
from tests.test_callback import VOCAB, Model


@dataclass
class Recorder:
    """What records on this rank."""

    ranks: Ranks
    failure: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Keep an error."""
        self.failure = error


def accumulated(folder: Path, dtype: torch.dtype | None) -> Any:
    """Two micro-batches whose gradients stay whole, and a third that reduces them: without passes, and with them.

    Returns:
        For both the gradients and, before each backward pass, whether modules hold whole tensors, whether they reduce,
        and what they are to gather next; and the numbers of passes that this rank wanted.
    """
    dist.init_process_group("gloo")
    ranks, found, n_passes = Ranks.join(), [], []
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    outermost = replace(policy, output_dtype=torch.float32)
    for with_passes in (False, True):
        model, mesh = make(Model), init_device_mesh("cpu", (ranks.size,))
        for i, layer in enumerate(model.encoder.layers):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=i == 0)
        fully_shard(model, mesh=mesh, mp_policy=outermost)
        parameters = dict(model.named_parameters())
        hooks = watch_unsharding(model, list(parameters))
        engine = TokenEngine(choice=TokenChoice((1, 2), "target", 9))
        generator = torch.Generator().manual_seed(ranks.rank)
        states = []
        for i in range(3):
            model.set_requires_gradient_sync(i == 2)
            x, y = torch.randint(VOCAB, (2, 4, 7), generator=generator)
            y[y < 3] = 3
            if ranks.rank == 0:
                y[0, :i] = 1
            bring_to_rest(model)
            with engine.tape(parameters, (x, y), 4) as tape:
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            if with_passes:
                probe = PermutationProbe(model, parameters, lambda batch: model(batch[0]), (x, y), 4, 0)  # noqa: B023
                pass_together(
                    Recorder(ranks),
                    model,
                    lambda _: engine.passes(tape, loss, 4),  # noqa: B023
                    probe,
                )
                n_passes.append(len(tape.passes))
            groups = [m._get_fsdp_state()._fsdp_param_group for m in (model, *model.encoder.layers)]
            states.append(
                [(group.is_unsharded, group.reduce_grads, list(group._post_forward_indices)) for group in groups]
            )
            loss.backward()
        for hook in hooks:
            hook.remove()
        bring_to_rest(model)
        found.append(({n: p.grad.full_tensor().numpy() for n, p in model.named_parameters()}, states))
    dist.destroy_process_group()
    return (*found, n_passes)
