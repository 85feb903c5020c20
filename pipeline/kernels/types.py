"""Types shared by the compiled loops and their callers."""

# Range of values that a rectifier passes unchanged: (lower, upper); an upper bound of None means unbounded.
PassRange = tuple[float, float | None]
