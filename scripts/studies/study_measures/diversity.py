"""Facets of the images of a unit, beside the columns of `Atlas.units`."""

from study_measures.vendi import with_facets as values

__all__ = ["values"]
