"""The store: a trace as a Zarr group; the only part of the package that knows Zarr."""

from lightning_gradtrace.store.reader import Trace as Trace
from lightning_gradtrace.store.reader import open_trace as open_trace
from lightning_gradtrace.store.schema import CORE_SPECS as CORE_SPECS
from lightning_gradtrace.store.schema import ArraySpec as ArraySpec
from lightning_gradtrace.store.target import StoreError as StoreError
from lightning_gradtrace.store.views import Block as Block
from lightning_gradtrace.store.views import TopKView as TopKView
from lightning_gradtrace.store.writer import TraceWriter as TraceWriter
