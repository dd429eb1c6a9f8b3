"""Experiments that watch mechanisms form: a task, its measures, its claims, and what a trace adds to them."""
