"""Texts, tokens and batches of the experiments."""

from examples.data.english import EnglishData as EnglishData
from examples.data.planted import PlantedData as PlantedData
from examples.data.wikitext2 import WikiText2Data as WikiText2Data
