"""What is kept of a step: one file per kind of record."""

from lightning_gradtrace.record._base import ParameterInfo as ParameterInfo
from lightning_gradtrace.record._base import ParameterShifts as ParameterShifts
from lightning_gradtrace.record._base import Record as Record
from lightning_gradtrace.record._base import StepShifts as StepShifts
from lightning_gradtrace.record.token_grads import TokenGrads as TokenGrads
from lightning_gradtrace.record.topk import TopK as TopK
