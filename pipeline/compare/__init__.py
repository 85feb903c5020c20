"""Compare runs unit by unit: statistics, tables, and a site that shows their feature visualizations side by side.

    from pipeline.compare import align, open_runs
    with open_runs(["distill", "tv"]) as inputs:
        comparison = align(inputs)
    print(comparison.summary())     # medians, intervals, wins, losses and p values, for all units and for each layer
    table = comparison.units()      # pandas: one row per unit and contender

Atlases are read with `pipeline.open_atlas`. `pipeline.compare.build.build` writes the tables and the site to a folder.
"""

# `pipeline.compare.build` is not imported here: the page builder needs Jinja2, the statistics do not.
from pipeline.compare.alignment import Comparison as Comparison
from pipeline.compare.alignment import align as align
from pipeline.compare.runs import Contender as Contender
from pipeline.compare.runs import RunComparison as RunComparison
from pipeline.compare.runs import open_runs as open_runs
