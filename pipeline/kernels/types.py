"""Types that the compiled loops and their callers share."""

# The range of values that a rectifier passes unchanged: (lower, upper), None for no upper end.
Limits = tuple[float, float | None]
