"""How the per-sample gradients of a parameter are held until they are needed, one class for each kind."""

from lightning_gradtrace.capture.shares._base import DenseShare as DenseShare
from lightning_gradtrace.capture.shares._base import DiagonalShare as DiagonalShare
from lightning_gradtrace.capture.shares._base import OuterShare as OuterShare
from lightning_gradtrace.capture.shares._base import RowShare as RowShare
from lightning_gradtrace.capture.shares._base import Share as Share
from lightning_gradtrace.capture.shares._base import SumShare as SumShare
from lightning_gradtrace.capture.shares._base import accumulation_dtype as accumulation_dtype
from lightning_gradtrace.capture.shares._base import add_shares as add_shares
