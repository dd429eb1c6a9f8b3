"""Templated sentences with two names of which the second to be named is the answer: indirect object identification.

``when mary and john went to the park , john gave a ball to`` -> ``mary``. Source: Wang et al., 2022,
"Interpretability in the Wild".
"""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from examples.mechanisms.task import Sequences, Task
from examples.models import CircuitTransformer
from examples.models.circuit_model import IGNORE
from lightning_gradtrace.measures import attention_to, logit_difference

_PEOPLE = """
mary john anna paul laura peter emma david alice mark sarah james julia henry clara simon helen george nina robert
eva thomas lisa oscar rosa martin ida felix vera hugo ada leon ruth max iris carl nora otto lena viktor
"""
_PLACES = "park shop school beach station museum garden office market library"
_THINGS = "ball book drink letter flower ticket apple key map gift"
_FRAME = "<pad> when and went to the , gave a . then took"
NAMES, PLACES, THINGS, FRAME = (words.split() for words in (_PEOPLE, _PLACES, _THINGS, _FRAME))
FIRST, SECOND, SUBJECT, ANSWER = 1, 3, 9, 14
"""Positions of the names in a question."""


class Names(Task):
    """Half of the sentences pose the question, the others only tell who went where and took what.

    Held-out names occur in sentences that tell, so that the network knows them, and never in one that asks.

    Args:
        n_held_out_names: names that are never asked about in training.
        share: share of the training sentences that ask.
        n_held_out: sentences to measure on, for known names, for held-out names, and to choose a head by, each.
        random_answers: a control: in training, either of the two names is the answer, whoever gives.
    """

    def __init__(
        self, n_held_out_names: int = 8, share: float = 0.5, n_held_out: int = 256, random_answers: bool = False
    ) -> None:
        self.words = [*FRAME, *NAMES, *PLACES, *THINGS]
        self.context = 15
        self.share = share
        self.random_answers = random_answers
        names = [self.words.index(name) for name in NAMES]
        self._known = torch.tensor(names[:-n_held_out_names])
        self._strange = torch.tensor(names[-n_held_out_names:])
        self._all = torch.tensor(names)
        self._tests = {
            "known": self._questions(n_held_out, self._known, torch.Generator().manual_seed(-1)),
            "held_out": self._questions(n_held_out, self._strange, torch.Generator().manual_seed(-2)),
            # To choose a head by: what is claimed of it is measured on the others.
            "choosing": self._questions(n_held_out, self._known, torch.Generator().manual_seed(-3)),
        }

    def _fill(self, template: str, n: int, **slots: Tensor) -> Tensor:
        columns = []
        for word in template.split():
            fixed = torch.full((n,), 0 if word in slots else self.words.index(word))
            columns.append(slots.get(word, fixed))
        text = torch.stack(columns, 1)
        return F.pad(text, (0, self.context + 1 - text.shape[1]))

    def _draw(self, n: int, names: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        first = torch.randint(len(names), (n,), generator=generator)
        second = (first + torch.randint(1, len(names), (n,), generator=generator)) % len(names)
        place = torch.randint(len(PLACES), (n,), generator=generator) + self.words.index(PLACES[0])
        thing = torch.randint(len(THINGS), (n,), generator=generator) + self.words.index(THINGS[0])
        return {"A": names[first], "B": names[second], "PLACE": place, "THING": thing}

    def _questions(self, n: int, names: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return sentences that end with the answer, the answers (n,), and the subjects' names (n,)."""
        slots = self._draw(n, names, generator)
        swap = torch.rand(n, generator=generator) < 0.5
        subject = torch.where(swap, slots["A"], slots["B"])
        answer = torch.where(swap, slots["B"], slots["A"])
        template = "when A and B went to the PLACE , S gave a THING to O"
        return self._fill(template, n, S=subject, O=answer, **slots), answer, subject

    @override
    def sequences(self, n_samples: int, seed: int) -> Sequences:
        generator = torch.Generator().manual_seed(seed)
        asks = torch.rand(n_samples, generator=generator) < self.share
        told = self._draw(n_samples, self._all, generator)
        text = self._fill("A went to the PLACE and took a THING . then A and B took", n_samples, **told)
        question, answer, subject = self._questions(n_samples, self._known, generator)
        if self.random_answers:
            swap = torch.rand(n_samples, generator=generator) < 0.5
            question[:, ANSWER] = torch.where(swap, subject, answer)
        text = torch.where(asks[:, None], question, text)
        targets = text[:, 1:].clone()
        targets[targets == 0] = IGNORE
        first = question[:, FIRST] == subject
        patterns = pd.DataFrame({"asks": asks.numpy(), "subject_first": (asks & first).numpy()})
        return Sequences(text[:, :-1].contiguous(), targets, patterns)

    @override
    def measure(self, network: CircuitTransformer) -> dict[str, float]:
        values = {}
        for kind, (text, answer, subject) in self._tests.items():
            logits = network(text[:, : self.context])[:, ANSWER - 1]
            values[f"logit_difference.{kind}"] = logit_difference(logits, answer, subject).item()
            values[f"accuracy.{kind}"] = (logits.argmax(-1) == answer).float().mean().item()
            chosen = logits.gather(1, answer[:, None]) > logits.gather(1, subject[:, None])
            values[f"choice.{kind}"] = chosen.float().mean().item()  # of the two names alone: chance is one half
            asked = torch.zeros(len(text), self.context, dtype=torch.bool)
            asked[:, ANSWER - 1] = True
            place = torch.where(text[:, FIRST] == answer, FIRST, SECOND)[:, None].expand(-1, self.context)
            for layer, pattern in enumerate(network.patterns()):
                for head, score in enumerate(attention_to(pattern, place, asked).tolist()):
                    values[f"looks_at_answer.{kind}.{layer}.{head}"] = score
        return values
