"""A generated text whose topics and topic words are known: ground truth for the whole pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from examples.data.base import TextDataModule

TOPICS = {
    "sea": "ship harbour sail anchor tide captain",
    "law": "court judge verdict trial lawyer jury",
    "music": "violin melody orchestra rhythm concert choir",
    "farm": "wheat plough barn harvest cattle meadow",
    "sky": "planet orbit comet telescope galaxy moon",
    "war": "army siege soldier cannon fortress retreat",
    "kitchen": "oven butter recipe flour spoon kettle",
    "body": "heart kidney muscle nerve blood lung",
}
COMMON = (
    "the of and to in a was that it for on with as his he by at from is had were which be this are an but not or her "
    "one their also first been after who two they other new when its more over all there time into only up than some "
    "three most during out year may between later where about no then made many used would being second can both under"
)


class PlantedData(TextDataModule):
    """Documents of one topic each: its words, drawn evenly, among common words that all topics share.

    Documents last a whole number of contexts and columns a whole number of documents, so that every training sample
    belongs to one topic.

    Args:
        n_documents: documents of the training split, rounded up to fill all columns.
        contexts_per_document: length of a document, in samples.
        topic_share: probability that a word of a document is one of its topic's words.
        seed: of the generated text.
        **options: see `TextDataModule`.

    Attributes:
        topics: topic words by topic, the ground truth.
    """

    def __init__(
        self,
        n_documents: int = 400,
        contexts_per_document: int = 4,
        topic_share: float = 0.35,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.contexts_per_document = contexts_per_document
        self.n_documents = -(-n_documents // self.batch_size) * self.batch_size
        self.topic_share = topic_share
        self.seed = seed
        self.topics = {topic: tuple(words.split()) for topic, words in TOPICS.items()}
        self._order = np.random.default_rng(seed).permutation(np.arange(self.n_documents) % len(TOPICS))

    @override
    def lines(self) -> dict[str, list[str]]:
        """Return the documents of the training and the validation split, one per line."""
        rng = np.random.default_rng(self.seed)
        n_validation = max(self.n_documents // 10, self.eval_batch_size)
        return {"train": self._documents(rng, self._order), "val": self._documents(rng, self._order[:n_validation])}

    def topic_of(self, sample_id: int) -> str:
        """Return the topic of the document that training sample `sample_id` is part of.

        Args:
            sample_id: item number in the training data set.
        """
        batch, column = divmod(sample_id, self.batch_size)
        document = column * (self.n_documents // self.batch_size) + batch // self.contexts_per_document
        return list(self.topics)[self._order[document]]

    def _documents(self, rng: np.random.Generator, order: np.ndarray) -> list[str]:
        common = np.array(COMMON.split(), dtype=object)
        weights = 1.0 / np.arange(1, len(common) + 1)  # Zipf's law
        weights /= weights.sum()
        length = self.context * self.contexts_per_document
        documents = []
        for topic in order:
            words = rng.choice(common, size=length, p=weights)
            own = np.array(list(self.topics.values())[topic], dtype=object)
            topical = rng.random(length) < self.topic_share
            words[topical] = rng.choice(own, size=int(topical.sum()))
            documents.append(" ".join(words))
        return documents
