"""`gradtrace` on the command line: one file per command, what they share in files with an underscore.

A command reads a trace, calls one function of `lightning_gradtrace.analysis` (or of the store) and shows its table.
Packages are imported inside the commands, so that `gradtrace --help` answers at once and torch is loaded only where a
model is.
"""

from lightning_gradtrace.cli._app import app as app
from lightning_gradtrace.cli._app import main as main
