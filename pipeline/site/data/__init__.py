"""Data that the pages load: records of units, the search index, the JSON API."""
