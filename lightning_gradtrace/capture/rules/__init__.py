"""Layer rules, one file per family. Importing this package registers them all."""

import importlib
import pkgutil

from lightning_gradtrace.capture.rules._base import Call as Call
from lightning_gradtrace.capture.rules._base import Rule as Rule
from lightning_gradtrace.capture.rules._base import register as register
from lightning_gradtrace.capture.rules._base import registered as registered
from lightning_gradtrace.capture.rules._base import rule_for as rule_for

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
