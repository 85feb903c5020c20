"""The command line; the only package that imports Hydra."""

import os

from pipeline.core.machine import SPIN_LIMIT

# Before PyTorch is loaded, which reads it. scripts/atlas and containers set it, too; `atlas` of an installed package
# and `python -m pipeline` have no such script.
if "OMP_WAIT_POLICY" not in os.environ:
    for _name, _value in SPIN_LIMIT.items():
        os.environ.setdefault(_name, _value)
