"""Experiments on Lightning and Hydra: `train.py` records a run, `analyze.py` reads it back as words."""
