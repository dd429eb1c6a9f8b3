"""Uses of every function with a rule: what calls it, on which layouts, and whether the closed form serves."""

from tests.capture.rules.uses._base import N as N
from tests.capture.rules.uses._base import UseCase as UseCase
from tests.capture.rules.uses.arithmetic import ACTIVATION, ARITHMETIC
from tests.capture.rules.uses.conv import CONV
from tests.capture.rules.uses.einsum import EINSUM
from tests.capture.rules.uses.embedding import EMBEDDING
from tests.capture.rules.uses.norm import NORM
from tests.capture.rules.uses.products import BILINEAR, LINEAR, MATMUL

FAMILIES = (LINEAR, MATMUL, EINSUM, BILINEAR, EMBEDDING, CONV, NORM, ARITHMETIC, ACTIVATION)
USES = [case for family in FAMILIES for case in family]
