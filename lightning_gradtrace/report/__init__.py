"""From tables to figures and one static page; nothing else than the tables is needed."""

from lightning_gradtrace.report.document import page_document as page_document
from lightning_gradtrace.report.page import ReportFiles as ReportFiles
from lightning_gradtrace.report.page import write_page as write_page
from lightning_gradtrace.report.page import write_report as write_report
from lightning_gradtrace.report.plots import plot_activations as plot_activations
from lightning_gradtrace.report.plots import plot_bigrams as plot_bigrams
from lightning_gradtrace.report.plots import plot_changes as plot_changes
from lightning_gradtrace.report.plots import plot_directions as plot_directions
from lightning_gradtrace.report.plots import plot_effects as plot_effects
from lightning_gradtrace.report.plots import plot_flips as plot_flips
from lightning_gradtrace.report.plots import plot_formation as plot_formation
from lightning_gradtrace.report.plots import plot_movement as plot_movement
from lightning_gradtrace.report.plots import plot_movers as plot_movers
from lightning_gradtrace.report.plots import plot_outliers as plot_outliers
from lightning_gradtrace.report.plots import plot_spectra as plot_spectra
from lightning_gradtrace.report.plots import plot_token_losses as plot_token_losses
from lightning_gradtrace.report.plots import plot_tokens as plot_tokens
from lightning_gradtrace.report.plots import plot_top_samples as plot_top_samples
from lightning_gradtrace.report.plots import plot_weights as plot_weights
from lightning_gradtrace.report.summary import neuron_summary as neuron_summary
from lightning_gradtrace.report.summary import run_summary as run_summary
from lightning_gradtrace.report.tables import TABLES as TABLES
from lightning_gradtrace.report.tables import read_tables as read_tables
from lightning_gradtrace.report.tables import write_tables as write_tables
from lightning_gradtrace.report.text import result_text as result_text
