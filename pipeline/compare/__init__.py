"""Runs against each other: numbers unit by unit, what they come to, and a site with the pictures side by side.

    from pipeline.compare import align, opened
    with opened(["distill", "tv"]) as contest:
        found = align(contest)
    print(found.summary())     # medians, intervals, wins, losses, p: for all units and for each layer
    table = found.units()      # pandas: one row a unit and contender

Everything is read through `pipeline.open_atlas`; `build` writes tables and site to a folder.
"""

from pipeline.compare.alignment import Comparison as Comparison
from pipeline.compare.alignment import align as align
from pipeline.compare.build import build as build
from pipeline.compare.runs import Contender as Contender
from pipeline.compare.runs import RunComparison as RunComparison
from pipeline.compare.runs import opened as opened
