"""The page of a run: python -m experiments.report. A file each for its parts:

__main__.py    the command
page.py        puts the parts together
training.py    what was trained, and the curves of its log
results.py     tables of evaluate.py's results, confusion by class
films.py       queries with their nearest videos, and flow, playing
prototypes.py  how far prototypes lie from each other
charts.py      curves and bars as SVG
flow_films.py  flow drawn over its film

The page itself, and the films on it, are those of a collection: support/page.py, support/previews.py.
"""
