"""Sample images from the wheels of scikit-image and scikit-learn, as crops at several scales."""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from pipeline.core.errors import AtlasError
from pipeline.data.config import DataConfig
from pipeline.data.readers.base import DatasetImage, Listing

# All are free to use; see the notes of the two packages.
# Not used: drawings, test charts, thumbnails, and the right half of the motorcycle stereo pair.
SAMPLES = {
    "skimage/data": (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
        "coins.png", "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
        "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}  # fmt: skip

# Images whose licence demands that their author is named wherever they are shown. The others have no such condition.
CREDITS = {
    "sklearn/china.jpg": (
        "china.jpg by danielbuechele (https://www.flickr.com/photos/danielbuechele/6061409035/), CC BY 2.0 "
        "(https://creativecommons.org/licenses/by/2.0/), cropped"
    ),
    "sklearn/flower.jpg": (
        "flower.jpg by vultilion (https://www.flickr.com/photos/vultilion/6056698931/), CC BY 2.0 "
        "(https://creativecommons.org/licenses/by/2.0/), cropped"
    ),
}

# Grids of square crops: (side as a share of the shorter side, rows, columns), from the whole image to close views.
GRID = ((1.0, 1, 2), (0.6, 2, 3), (0.35, 3, 4))


def list_images(config: DataConfig) -> Listing:
    """List the crops of all sample images; the label is the name of the image.

    Raises:
        AtlasError: If scikit-image or scikit-learn is not installed.
    """
    photos: list[DatasetImage] = []
    roots: dict[str, str] = {}
    sources = [(folder, name) for folder, names in SAMPLES.items() for name in names]
    for source, (folder, name) in enumerate(sources):
        package, _, subfolder = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise AtlasError(f"data=samples needs the package {package}; install the project with scripts/atlas.")
        roots[package] = str(Path(spec.submodule_search_locations[0], subfolder))
        with Image.open(Path(roots[package], name)) as image:
            width, height = image.size
        for box in grid_boxes(width, height):
            path = f"{package}/{name}#{','.join(map(str, box))}"
            photos.append(DatasetImage(path, Path(name).stem, source, box))
    return Listing(tuple(photos), roots)


def grid_boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield square crops of an image in the grids of `GRID`, (left, top, right, bottom), each crop once."""
    yielded = set()
    for share, rows, columns in GRID:
        side = round(share * min(width, height))
        if height > width:
            rows, columns = columns, rows
        for row in range(rows):
            for column in range(columns):
                top = round((height - side) * (row / (rows - 1) if rows > 1 else 0.5))
                left = round((width - side) * (column / (columns - 1) if columns > 1 else 0.5))
                box = (left, top, left + side, top + side)
                if box not in yielded:
                    yielded.add(box)
                    yield box


def credits_of(paths: Iterable[str]) -> tuple[str, ...]:
    """Return a line for each author who must be named where images with these paths are shown."""
    sources = {path.rpartition("#")[0] for path in paths if path.startswith("sklearn/")}
    return tuple(credit for source, credit in CREDITS.items() if source in sources)
