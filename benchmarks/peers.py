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
        if workload.reference:
            raise NotAvailable("opacus wants `nn.MultiheadAttention` replaced by a layer of its own")
        from opacus.grad_sample import GradSampleModule

        batch_first = workload.batch_axis == 0
        # In a list, so that its parameters are not registered twice.
        self._wrapped = [
            GradSampleModule(self.network, batch_first=batch_first, strict=True, force_functorch=self.functorch)
        ]

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
    """dattri-llm's hooks with its capture callback; the factors that it collects are multiplied out."""

    def __init__(self, workload: Workload, optimizer: Optimizer = "sgd") -> None:
        super().__init__(workload, optimizer)
        if importlib.util.find_spec("dattri_llm") is None:
            raise NotAvailable("dattri-llm is not installed")
        if workload.reference:
            raise NotAvailable("dattri-llm hooks modules, and sees nothing of what `nn.MultiheadAttention` does inside")
        from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig
        from dattri_llm.gradient.callbacks import CaptureCallback

        self._callback = CaptureCallback()
        config = HookManagerConfig(linear_io=REGISTER_ALL)
        self._collecting = HookManager(self.network, config=config, callbacks=[self._callback]).collect()
        self._collecting.__enter__()

    @override
    def capture(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return per-sample gradients; dattri-llm appends a layer's bias to its weight."""
        cross_entropy(self.network(tokens), targets).backward()
        assert self._callback.record is not None
        found = {}
        for name, values in self._callback.record.gradient.materialize().data.items():
            parts = dict(self.network.get_submodule(name).named_parameters())
            values = values.view(len(values), *parts["weight"].shape[:-1], -1)
            for part, parameter in parts.items():
                size = parameter.shape[-1] if parameter.dim() == parts["weight"].dim() else 1
                own, values = values.split([size, values.shape[-1] - size], dim=-1)
                found[f"{name}.{part}"] = own.reshape(len(own), *parameter.shape)
        return found


PEERS: dict[str, Callable[[Workload, Optimizer], Any]] = {
    "whole-model vmap(grad), capture only": WholeModelVmap,
    "opacus hooks, capture only": Opacus,
    "opacus functorch, capture only": OpacusFunctorch,
    "dattri-llm collection, capture only": Dattri,
    "B backward passes, capture only": Backwards,
}
