"""Record which training sample moved which weight, at every step, and ask questions of that record afterwards."""

from lightning_gradtrace.callback import GradTrace as GradTrace
from lightning_gradtrace.record.topk import TopK as TopK
from lightning_gradtrace.store.reader import open_trace as open_trace

__version__ = "0.1.0"
