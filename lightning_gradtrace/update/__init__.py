"""From gradients to shifts: one file per optimizer family, clipping, and the ledger."""

from lightning_gradtrace.update._base import Split as Split
from lightning_gradtrace.update._base import UpdateRule as UpdateRule
from lightning_gradtrace.update._registry import load_rules as load_rules
from lightning_gradtrace.update._registry import rule_for as rule_for

load_rules(__name__)
