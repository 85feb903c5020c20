"""Data that pages load: records of units, the search index, the JSON interface."""
