"""Facets in a run: their state and tasks, and the reuse of those of other runs."""
