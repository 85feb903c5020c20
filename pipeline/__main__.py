"""`python -m pipeline` is `atlas`, for places where the project was copied but not installed."""

import sys

from pipeline.cli.main import main

sys.exit(main())
