"""Photographs of an atlas: cut to what a unit saw, or whole, blurred where the licence asks for that."""

from collections import OrderedDict

from PIL import Image, ImageFilter, ImageOps

from pipeline.store.reader import Atlas, LayerView

# Decoded photographs are kept up to so many bytes, for they come back in many units.
KEPT = 400_000_000
GREY = (128, 128, 128)


class Photos:
    """Crops of `side` × `side` pixels. With `blur`, only colours and coarse shapes are left of any photograph."""

    def __init__(self, atlas: Atlas, side: int, blur: bool = False) -> None:
        self._atlas = atlas
        self._side = side
        self._blur = blur
        self._cropped = atlas.examples_store == "crops"
        self._kept: OrderedDict[int, Image.Image | None] = OrderedDict()
        self._bytes = 0

    def crop(self, layer: LayerView, index: int, y: int, x: int, pair: int) -> Image.Image | None:
        """What unit (y, x) of `layer` saw of photograph `index`, RGB; None if the atlas does not hold it."""
        if self._cropped:
            kept = layer.crop(pair)
            return kept and self._square(kept.convert("RGB"))
        photo = self._photo(index)
        if photo is None:
            return None
        box, size = layer.crop_box(y, x), layer.input_size
        if box is None:
            return self._square(photo)
        across, down = photo.width / size[1], photo.height / size[0]
        left, top, right, bottom = (v * s for v, s in zip(box, (across, down) * 2, strict=True))
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        if abs((right - left) / (bottom - top) - 1) > 0.02:
            return self._square(photo.crop((round(left), round(top), round(right), round(bottom))))
        exact = (max(0.0, left), max(0.0, top), min(right, photo.width), min(bottom, photo.height))
        return photo.resize((self._side, self._side), Image.Resampling.BILINEAR, box=exact)

    def whole(self, index: int, longest: int) -> Image.Image | None:
        """The source picture, its longer side at most `longest` pixels; None if the atlas does not hold it."""
        picture = self._atlas.picture(index)
        if picture is None:
            return None
        picture.draft("RGB", (longest, longest))
        small = picture.convert("RGB")
        small.thumbnail((longest, longest), Image.Resampling.BILINEAR)
        return self.blurred(small)

    def blurred(self, image: Image.Image) -> Image.Image:
        """The same, or blurred by an eighth of its side."""
        return image.filter(ImageFilter.GaussianBlur(max(image.size) / 8)) if self._blur else image

    def _square(self, image: Image.Image) -> Image.Image:
        # Padded and not cut: the unit saw all of it.
        return ImageOps.pad(image, (self._side, self._side), Image.Resampling.BILINEAR, color=GREY)

    def _photo(self, index: int) -> Image.Image | None:
        if index not in self._kept:
            photo = self._atlas.photo(index)
            photo = photo and photo.convert("RGB")
            self._kept[index] = photo
            self._bytes += photo.width * photo.height * 3 if photo else 0
            while self._bytes > KEPT and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                self._bytes -= old.width * old.height * 3 if old else 0
        self._kept.move_to_end(index)
        return self._kept[index]
