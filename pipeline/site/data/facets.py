"""Records of the facets of units, for their pages."""

from collections.abc import Callable
from typing import Any

from pipeline.site.context.layer_summary import Catalogue
from pipeline.site.data.js_shards import rounded_decimals
from pipeline.store.facets import UnitFacets

# Facets in one sheet of `media.facet_sheets`, and examples beside the image of a facet.
PER_SHEET, EXAMPLES = 24, 8


def facets_of(
    facets: UnitFacets | None, catalogue: Catalogue, shown: bool
) -> Callable[[int], dict[str, Any] | None] | None:
    """Return a function from a channel to the record of the facets of its unit, or None if the atlas has none.

    Args:
        facets: Facets of the units of a layer.
        catalogue: Paths and labels of the dataset images.
        shown: Whether dataset images may be shown.
    """
    if facets is None:
        return None
    score, likeness = rounded_decimals(facets.monosemanticity), rounded_decimals(facets.similarity)
    columns = {name: rounded_decimals(getattr(facets, name)) for name in ("separation", "activation", "cosine")}
    row_of = {channel: row for row, channel in enumerate(facets.channel.tolist())}
    pictured = facets.thumbnails is not None and shown

    def examples(row: int) -> list[list[str]]:
        own = facets.nearest[row, :EXAMPLES]
        return [[catalogue.paths[image], catalogue.labels[image]] for image in own[own >= 0].tolist()]

    def record_of(channel: int) -> dict[str, Any] | None:
        row = row_of.get(channel)
        if row is None:
            return None
        return {
            "embedding": facets.embedding,
            "examples": int((facets.image[row] >= 0).sum()),
            "monosemanticity": score[row],
            "similarity": likeness[row],
            "sheet": [PER_SHEET, 1 + EXAMPLES, len(facets.unit)],
            "pictured": pictured,
            "facets": [
                {
                    "row": one,
                    "size": int(facets.size[one]),
                    "failed": bool(facets.failed[one]),
                    **{name: values[one] for name, values in columns.items()},
                    "nearest": examples(one),
                }
                for one in facets.of_unit(channel).tolist()
            ],
        }

    return record_of
