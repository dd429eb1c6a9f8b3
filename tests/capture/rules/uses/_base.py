"""How a use is described."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

N = 3


class Function(nn.Module):
    """A function of some bare parameters and the input."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], run: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(tuple(shape))))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass
class UseCase:
    """A module around one use.

    Attributes:
        name: its name.
        build: makes the module.
        input: shape of its input.
        axis: axis of the samples in the input.
        classes: number of tokens, for whole-number inputs.
        closed: whether the closed form serves; else the general rule must.
        share: class of the share of the first parameter, where it matters.
    """

    name: str
    build: Callable[[], nn.Module]
    input: Sequence[int]
    axis: int = 0
    classes: int | None = None
    closed: bool = True
    share: str | None = None

    def draw(self) -> Tensor:
        """Draw an input."""
        return torch.randint(self.classes, tuple(self.input)) if self.classes else torch.randn(*self.input)


def use(
    name: str, shapes: Mapping[str, Sequence[int]], run: Callable[..., Tensor], input: Sequence[int], **options: object
) -> UseCase:
    """Make the use case of a function of bare parameters."""
    return UseCase(name, lambda: Function(shapes, run), input, **options)


def layer(name: str, build: Callable[[], nn.Module], input: Sequence[int], **options: object) -> UseCase:
    """Make the use case of a layer."""
    return UseCase(name, build, input, **options)


def on(inner: Callable[[], nn.Module], run: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Wrap a layer in a function of it."""

    def build() -> nn.Module:
        module = Function({}, lambda self, x: run(self.layer, x))
        module.layer = inner()
        return module

    return build
