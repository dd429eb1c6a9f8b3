"""Other ways to per-sample gradients of the same training; each takes the same steps and keeps nothing.

The step is taken by hand, from the sum of what was captured. Selection and writing are not part of it, so a peer's
time is that of its capture alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from benchmarks.workloads import Optimizer, Training, Workload, cross_entropy


class NotAvailable(RuntimeError):
    """A peer can't run here or on this model; the message says why."""


class Peer(Training):
    """Takes its steps by hand from per-sample gradients of all parameters."""

    def __init__(self, workload: Workload, optimizer: Optimizer = "sgd") -> None:
        super().__init__(workload, optimizer)
        self.automatic_optimization = False

    def capture(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return per-sample gradients by parameter of `network`, shape (sample, *shape)."""
        raise NotImplementedError

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Capture, add up, clip and step."""
        for name, gradient in self.capture(*batch).items():
            self.network.get_parameter(name).grad = gradient.sum(0)
        if self.workload.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.workload.clip)
        self.optimizers().step()  # type: ignore[union-attr]


class WholeModelVmap(Peer):
    """torch.func: vmap(grad) of the whole model."""

    @override
    def capture(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return per-sample gradients."""
        parameters = {name: p.detach() for name, p in self.network.named_parameters()}
        buffers, axis = dict(self.network.named_buffers()), self.workload.batch_axis
        n = tokens.shape[axis]

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.network, (values, buffers), (x.unsqueeze(axis),))
            return F.cross_entropy(logits.flatten(0, 1), y) / n

        gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, axis, axis), randomness="different")
        return gradient(parameters, tokens, targets)  # type: ignore[no-any-return]


class Backwards(Peer):
    """One forward and backward pass for every sample."""

    @override
    def capture(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return per-sample gradients."""
        names, parameters = zip(*self.network.named_parameters(), strict=True)
        axis = self.workload.batch_axis
        n, rows = tokens.shape[axis], []
        for i in range(n):
            x, y = (t.narrow(axis, i, 1) for t in (tokens, targets))
            rows.append(torch.autograd.grad(cross_entropy(self.network(x), y) / n, parameters))
        return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


class Opacus(Peer):
    """opacus's GradSampleModule, with its layer hooks or (``functorch=True``) with torch.func layer by layer."""

    functorch = False

    def __init__(self, workload: Workload, optimizer: Optimizer = "sgd") -> None:
        super().__init__(workload, optimizer)
        if importlib.util.find_spec("opacus") is None:
            raise NotAvailable("opacus is not installed")
        from opacus.grad_sample import GradSampleModule

        try:
            self._wrapped = [  # in a list, so that its parameters are not registered twice
                GradSampleModule(
                    self.network, batch_first=workload.batch_axis == 0, strict=True, force_functorch=self.functorch
                )
            ]
        except NotImplementedError as error:
            raise NotAvailable(f"opacus refuses the model: {str(error).strip().splitlines()[-1][:150]}") from error

    @override
    def capture(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return per-sample gradients; opacus multiplies them by the batch size for a mean loss."""
        cross_entropy(self._wrapped[0](tokens), targets).backward()
        n, found = tokens.shape[self.workload.batch_axis], {}
        for name, p in self.network.named_parameters():
            found[name] = p.grad_sample / n  # type: ignore[attr-defined]
            p.grad_sample = None  # type: ignore[attr-defined]
        return found


class OpacusFunctorch(Opacus):
    """opacus with torch.func layer by layer."""

    functorch = True


class Dattri(Peer):
    """The collection callback of dattri-llm."""

    def __init__(self, workload: Workload, optimizer: Optimizer = "sgd") -> None:
        super().__init__(workload, optimizer)
        missing = [name for name in ("dattri", "dattri_llm") if importlib.util.find_spec(name) is None]
        raise NotAvailable(f"{' and '.join(missing) or 'no adapter for the installed version of dattri-llm'} missing")


PEERS: dict[str, Callable[[Workload, Optimizer], Any]] = {
    "whole-model vmap(grad), capture only": WholeModelVmap,
    "opacus hooks, capture only": Opacus,
    "opacus functorch, capture only": OpacusFunctorch,
    "dattri-llm collection, capture only": Dattri,
    "B backward passes, capture only": Backwards,
}
