"""One trace out of the parts that several ranks wrote (docs/store-format.md, "Several ranks")."""

from lightning_gradtrace.store.merged.trace import MergedTrace as MergedTrace
