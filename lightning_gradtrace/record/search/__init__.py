"""The search for the k largest shifts that doesn't write all shifts out (docs/concepts.md, 4); `TopK`, `TokenGrads`.

Every occurrence (or the whole step) has a threshold, at first a guess of its k-th largest value made from the last
step, then the k-th largest of what was found so far. Entries at or above it are candidates. By Cauchy-Schwarz
``|g[i][r, c]| <= |d[i][:, r]| |a[i][:, c]|``, so entries whose bound stays below the threshold are never formed. If a
guess turns out too high for some occurrence - fewer than k candidates - that occurrence is searched again with a
lower one. The outcome is that of sorting.

From the outside in:

- `searcher` guesses the thresholds, takes the most promising shares first, and searches again where it has to;
- `side_by_side` gives each of torch's threads some of the occurrences;
- `forming` forms the entries of one share block by block, as `pieces` cuts it;
- `bounds` says before which rows and columns (on a device: which samples) can reach the threshold at all;
- `sieve` leaves out most of the rest in bfloat16;
- `comparison` finds what reaches the threshold in a block that was formed;
- `gathering` collects that, and raises the threshold with it;
- `candidates` is what is found, and the order in which entries are kept.

Only `searcher`, `forming` and `bounds` know of shares; the others work on arrays and tensors.
"""

from lightning_gradtrace.record.search.candidates import Candidates as Candidates
from lightning_gradtrace.record.search.candidates import Known as Known
from lightning_gradtrace.record.search.candidates import fill_with_zeros as fill_with_zeros
from lightning_gradtrace.record.search.candidates import largest as largest
from lightning_gradtrace.record.search.searcher import Searcher as Searcher
