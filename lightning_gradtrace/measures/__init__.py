"""Measures of mechanisms: functions of attention patterns, logits and weights, and torchmetrics metrics of them.

None of them needs a trace; they say when a mechanism forms, and a trace says from which data.
"""

from lightning_gradtrace.measures.attention import attention_to as attention_to
from lightning_gradtrace.measures.brackets import bracket_depth as bracket_depth
from lightning_gradtrace.measures.brackets import closing_accuracy as closing_accuracy
from lightning_gradtrace.measures.brackets import innermost_open as innermost_open
from lightning_gradtrace.measures.fourier import excluded_loss as excluded_loss
from lightning_gradtrace.measures.fourier import fourier_basis as fourier_basis
from lightning_gradtrace.measures.fourier import frequency_power as frequency_power
from lightning_gradtrace.measures.fourier import frequency_subspace as frequency_subspace
from lightning_gradtrace.measures.fourier import gini as gini
from lightning_gradtrace.measures.fourier import key_frequencies as key_frequencies
from lightning_gradtrace.measures.fourier import logit_frequency_power as logit_frequency_power
from lightning_gradtrace.measures.fourier import restricted_loss as restricted_loss
from lightning_gradtrace.measures.induction import copying_score as copying_score
from lightning_gradtrace.measures.induction import in_context_learning_score as in_context_learning_score
from lightning_gradtrace.measures.induction import prefix_matching_score as prefix_matching_score
from lightning_gradtrace.measures.induction import second_half_accuracy as second_half_accuracy
from lightning_gradtrace.measures.induction import uniform_prefix_matching as uniform_prefix_matching
from lightning_gradtrace.measures.learning_coefficient import local_learning_coefficient as local_learning_coefficient
from lightning_gradtrace.measures.metrics import ClosingAccuracy as ClosingAccuracy
from lightning_gradtrace.measures.metrics import ExcludedLoss as ExcludedLoss
from lightning_gradtrace.measures.metrics import FlipRate as FlipRate
from lightning_gradtrace.measures.metrics import InContextLearning as InContextLearning
from lightning_gradtrace.measures.metrics import LogitDifference as LogitDifference
from lightning_gradtrace.measures.metrics import PrefixMatching as PrefixMatching
from lightning_gradtrace.measures.metrics import RestrictedLoss as RestrictedLoss
from lightning_gradtrace.measures.metrics import SecondHalfAccuracy as SecondHalfAccuracy
from lightning_gradtrace.measures.predictions import flip_rate as flip_rate
from lightning_gradtrace.measures.predictions import logit_difference as logit_difference
from lightning_gradtrace.measures.predictions import weight_norm as weight_norm
