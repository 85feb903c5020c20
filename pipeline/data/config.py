"""Configuration of the dataset (group `data` of `conf/`)."""

import dataclasses
from typing import Annotated

from pydantic import Field

from pipeline.core.validation import NullMeans

# Default of `data.max_pixels`. Larger images are refused before decoding: a small file can decompress to gigabytes.
MAX_PIXELS = 64_000_000

# Default of `data.max_bytes`. No photograph is larger; a member of an archive that is would fill the memory.
MAX_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images form the dataset, and where their labels come from.

    Attributes:
        source: Kind of source, a key of `pipeline.data.datasets.READERS`.
        root: Folder or single file to list, or its URL; of `webdataset`, also several as in `{000..012}`. Not used by
            `samples`.
        limit: Keep only the first `limit` images; None keeps all.
        labels: Table of paths and labels (CSV, TSV or a JSON object) that replaces the labels of the source.
        image: Column of a table that holds the images. None: the first column of a binary type.
        label: Column of a table that holds the labels. None: `label` or `labels`, if there is one.
        max_pixels: Images with more pixels are refused before they are decoded; None sets no limit.
        max_bytes: Encoded images of more bytes are refused before they are read; None sets no limit.
        name: Name of a dataset of torchvision, or of one on the Hugging Face Hub, `organization/name`.
        split: Part of a named dataset, for example "train"; None: the default part, or all.
        download: Download a named dataset if it is not there.
        relist: List all folders again, also those of large datasets that have not changed since they were last listed.
    """

    source: str = "samples"
    root: str | None = None
    limit: Annotated[Annotated[int, Field(ge=1)] | None, NullMeans("all")] = None
    labels: str | None = None
    image: str | None = None
    label: str | None = None
    max_pixels: Annotated[Annotated[int, Field(ge=1)] | None, NullMeans("no limit")] = MAX_PIXELS
    max_bytes: Annotated[Annotated[int, Field(ge=1)] | None, NullMeans("no limit")] = MAX_BYTES
    name: str | None = None
    split: str | None = None
    download: bool = False
    relist: bool = False
