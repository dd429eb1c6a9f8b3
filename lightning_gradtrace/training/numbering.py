"""Which number an optimizer step has, and whether its turn has come to be recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.optim import Optimizer


@dataclass
class StepNumbers:
    """Counts the steps of a training, of all optimizers and of each.

    Attributes:
        optimizers: all optimizers of the training.
        every_n_steps: every n-th step has its turn; with several optimizers, every n-th of each.
        next: number of the coming step, over all optimizers.
    """

    optimizers: Sequence[Optimizer]
    every_n_steps: int = 1
    next: int = field(default=0, init=False)
    _made: dict[int, int] = field(default_factory=dict, init=False)

    def take(self, optimizer: Optimizer, step: int) -> tuple[int, bool]:
        """Return the number of a step that is about to be made, and whether its turn has come.

        Args:
            optimizer: the optimizer.
            step: number of the step as the trainer counts; if it was used already, the next free one is taken.
        """
        number = max(step, self.next)
        self.next = number + 1
        count = number if len(self.optimizers) == 1 else self._made.get(id(optimizer), 0)
        self._made[id(optimizer)] = count + 1
        return number, count % self.every_n_steps == 0

    def place_of(self, optimizer: Optimizer) -> int:
        """Return the number of an optimizer, in the order of `configure_optimizers`."""
        return next((i for i, known in enumerate(self.optimizers) if known is optimizer), 0)

    def counts(self) -> list[int]:
        """Return how many steps each optimizer has made, for a checkpoint."""
        return [self._made.get(id(optimizer), 0) for optimizer in self.optimizers]

    def restore(self, counts: Sequence[int], next_step: int) -> None:
        """Go on where `counts` and `next` were taken."""
        self._made = {id(o): n for o, n in zip(self.optimizers, counts, strict=True)}
        self.next = next_step
