"""Every analysis of the package on one run, and its tables: `python -m examples.survey run=runs/wikitext2`."""
