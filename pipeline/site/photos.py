"""Photographs of an atlas, cut to what a unit saw."""

from collections import OrderedDict

from PIL import Image, ImageOps

from pipeline.atlas import Atlas, LayerView

# Photographs come back in many units of a layer; 400 of 224 × 224 pixels take 60 MB.
KEPT = 400


class Photos:
    """Crops of `side` × `side` pixels, with the last few photographs kept in memory."""

    def __init__(self, atlas: Atlas, side: int) -> None:
        self._atlas = atlas
        self._side = side
        self._kept: OrderedDict[int, Image.Image | None] = OrderedDict()

    def crop(self, layer: LayerView, index: int, y: int, x: int) -> Image.Image | None:
        """What unit (y, x) of `layer` saw of photograph `index`, RGB; None if the atlas does not hold it."""
        photo = self._photo(index)
        if photo is None:
            return None
        box, size = layer.crop_box(y, x), layer.input_size
        if box is None:
            # Padded and not cut: the unit saw all of it.
            return ImageOps.pad(photo, (self._side, self._side), Image.Resampling.LANCZOS, color=(128, 128, 128))
        across, down = photo.width / size[1], photo.height / size[0]
        left, top, right, bottom = box
        seen = photo.crop((round(left * across), round(top * down), round(right * across), round(bottom * down)))
        return ImageOps.pad(seen, (self._side, self._side), Image.Resampling.LANCZOS, color=(128, 128, 128))

    def _photo(self, index: int) -> Image.Image | None:
        if index not in self._kept:
            photo = self._atlas.photo(index)
            self._kept[index] = photo and photo.convert("RGB")
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(index)
        return self._kept[index]
