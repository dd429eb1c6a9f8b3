"""Models of the experiments."""

from examples.models.circuit_model import CircuitModel as CircuitModel
from examples.models.circuits import CircuitTransformer as CircuitTransformer
from examples.models.language_model import LanguageModel as LanguageModel
from examples.models.transformer import ReferenceTransformer as ReferenceTransformer
