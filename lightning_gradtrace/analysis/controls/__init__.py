"""What makes a claim about neurons, heads or entries believable: four controls, each with effect sizes and intervals.

All of them return the same columns, so their tables can be concatenated and pooled. A null result is a row like any
other: an interval that holds zero.
"""

from lightning_gradtrace.analysis.controls.frequency import frequency_control as frequency_control
from lightning_gradtrace.analysis.controls.null import null_control as null_control
from lightning_gradtrace.analysis.controls.null import null_tokens as null_tokens
from lightning_gradtrace.analysis.controls.null import permuted_links as permuted_links
from lightning_gradtrace.analysis.controls.peers import peer_control as peer_control
from lightning_gradtrace.analysis.controls.pool import pool_controls as pool_controls
from lightning_gradtrace.analysis.controls.samples import random_control as random_control
