"""What is kept of a step: one file per kind of record.

The records are `topk`, `dense`, `factored`, `sketch`, `norms`, `division`, `gains` and `token_grads`. A new one is a
file beside them and a line below (docs/extending.md, "A record"); `gains` is the shortest one to read.

- For all of them: `_base` has `Record` and the shifts that it reads, `schedule` says at which steps it is kept.
- For a record to use: `_parts` (shifts in blocks, shares as factors), `transfer` (from a GPU to the host), `projection`
  (of `Sketch`), `search` (the k largest shifts, of `TopK` and `TokenGrads`).
- Before a run: `parameters` lists what is tracked, `plan` predicts the bytes from rows that `made_up` draws, and
  `outlook` says it in a sentence.
"""

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
