"""Methods of finding notable tokens, one file each; adding one is a file and a line here."""

from lightning_gradtrace.analysis.scores import hypergeometric, kl, log_odds, log_product, mahalanobis, univariate
from lightning_gradtrace.analysis.scores._base import Candidates as Candidates
from lightning_gradtrace.analysis.scores._base import Method as Method

METHODS: dict[str, Method] = {
    "univariate": univariate.METHOD,
    "log_product": log_product.METHOD,
    "mahalanobis": mahalanobis.METHOD,
    "kl": kl.METHOD,
    "log_odds": log_odds.METHOD,
    "hypergeometric": hypergeometric.METHOD,
}
