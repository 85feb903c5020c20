"""Folders of image files, in the layout of torchvision's `ImageFolder`."""

from pipeline.data import image_formats
from pipeline.data.config import DataConfig
from pipeline.data.readers.base import MISSING, DatasetImage, Listing, list_files, report_skipped


def list_images(config: DataConfig, suffixes: frozenset[str] | None = None) -> Listing:
    """List all image files below `data.root`; the label of an image is its top-level folder.

    Args:
        config: Configuration with the root.
        suffixes: Suffixes to list. None: those of all formats that this machine can decode, and files without a
            suffix whose content is an image.
    """
    listed_suffixes = image_formats.suffixes() if suffixes is None else suffixes
    files = list_files(config, listed_suffixes, detect_by_content=suffixes is None)
    report_skipped(config, bool(files.paths), files.skipped, listed_suffixes)
    photos = [
        DatasetImage(path, path.partition("/")[0] if "/" in path else "", i) for i, path in enumerate(files.paths)
    ]
    return Listing(tuple(photos), {"": str(files.root)}, unreadable=dict.fromkeys(sorted(files.broken), MISSING))
