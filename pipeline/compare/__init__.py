"""Runs against each other: numbers unit by unit, what they come to, and a site with the pictures side by side.

    from pipeline.compare import align, opened
    with opened(["distill", "tv"]) as contest:
        found = align(contest)
    print(found.summary())     # medians, intervals, wins, losses, p: for all units and for each layer
    table = found.units()      # pandas: one row a unit and contender

Everything is read through `pipeline.open_atlas`; `build` writes tables and site to a folder.
"""

from pipeline.compare.build import build as build
from pipeline.compare.contenders import Contender as Contender
from pipeline.compare.contenders import Contest as Contest
from pipeline.compare.contenders import opened as opened
from pipeline.compare.tables import Comparison as Comparison
from pipeline.compare.tables import align as align
