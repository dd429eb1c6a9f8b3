"""From tables to figures and one static page; nothing else than the tables is needed."""

from lightning_gradtrace.report.page import ReportFiles as ReportFiles
from lightning_gradtrace.report.page import write_report as write_report
from lightning_gradtrace.report.summary import neuron_summary as neuron_summary
from lightning_gradtrace.report.summary import run_summary as run_summary
from lightning_gradtrace.report.tables import TABLES as TABLES
from lightning_gradtrace.report.tables import read_tables as read_tables
from lightning_gradtrace.report.tables import write_tables as write_tables
from lightning_gradtrace.report.text import result_text as result_text
