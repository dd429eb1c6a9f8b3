"""What is kept of a step: one file per kind of record."""

from lightning_gradtrace.record._base import ParameterInfo as ParameterInfo
from lightning_gradtrace.record._base import ParameterShifts as ParameterShifts
from lightning_gradtrace.record._base import Record as Record
from lightning_gradtrace.record._base import StepShifts as StepShifts
from lightning_gradtrace.record.dense import Dense as Dense
from lightning_gradtrace.record.division import Division as Division
from lightning_gradtrace.record.factored import Factored as Factored
from lightning_gradtrace.record.gains import Gains as Gains
from lightning_gradtrace.record.norms import Norms as Norms
from lightning_gradtrace.record.schedule import EveryNSteps as EveryNSteps
from lightning_gradtrace.record.schedule import LogSpaced as LogSpaced
from lightning_gradtrace.record.schedule import Predicate as Predicate
from lightning_gradtrace.record.schedule import Schedule as Schedule
from lightning_gradtrace.record.schedule import StepRanges as StepRanges
from lightning_gradtrace.record.sketch import Sketch as Sketch
from lightning_gradtrace.record.token_grads import TokenGrads as TokenGrads
from lightning_gradtrace.record.topk import TopK as TopK
