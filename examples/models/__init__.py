"""Models of the experiments."""

from examples.models.language_model import LanguageModel as LanguageModel
from examples.models.transformer import ReferenceTransformer as ReferenceTransformer
