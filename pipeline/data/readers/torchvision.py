"""Classification datasets of torchvision, by name.

Their files are read in place. Datasets without files, which torchvision holds in memory, are written to an archive
beside them once. Only those that torchvision verifies before it reads pickles are listed here.
"""

import dataclasses
import inspect
import io
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import AtlasError, first_line, nearest_names
from pipeline.data.config import DataConfig
from pipeline.data.image_table import ImageTable, file_size
from pipeline.data.readers import folder, webdataset
from pipeline.data.readers.base import DatasetImage, Listing

log = logging.getLogger(__name__)

# Datasets whose images are files, and those that are arrays; names as in torchvision.
FILES = (
    "Country211", "DTD", "EuroSAT", "FGVCAircraft", "Flowers102", "Food101", "GTSRB", "Imagenette", "OxfordIIITPet",
    "Places365", "RenderedSST2", "StanfordCars", "SUN397",
)  # fmt: skip
ARRAYS = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "STL10", "SVHN")
IMAGENET = "ImageNet"

# Attributes of datasets: (path, class) pairs; or paths, with classes beside them.
_PAIRS = ("samples", "imgs", "_samples")
_PATHS, _LABELS = ("_image_files", "_images"), "_labels"


def list_images(config: DataConfig) -> Listing:
    """List the images of the dataset `data.name` below `data.root`; labels are the names of its classes.

    Raises:
        AtlasError: If the dataset is unknown or is not there; nothing is downloaded unless `data.download`.
    """
    name = _full_name(config)
    if not config.root:
        raise AtlasError(f"data=torchvision data.name={name} needs data.root=<folder>: the `root` of torchvision.")
    root = Path(config.root).expanduser().absolute()
    if name == IMAGENET and not config.download:
        return _imagenet(config, root)
    dataset = _construct(name, config, root)
    if name == IMAGENET:
        return _imagenet(config, root)
    return _from_arrays(name, config, dataset, root) if name in ARRAYS else _from_files(name, dataset, root)


def _full_name(config: DataConfig) -> str:
    """Return the name of a dataset as torchvision spells it."""
    known = {name.lower(): name for name in (*FILES, *ARRAYS, IMAGENET)}
    asked = (config.name or "").lower().replace("_", "").replace("-", "")
    if asked not in known:
        raise AtlasError(f"data.name={config.name!r} is unknown to data=torchvision. {nearest_names(asked, known)}")
    return known[asked]


def _construct(name: str, config: DataConfig, root: Path) -> Any:
    """Create the dataset, which downloads it if `data.download`."""
    import torchvision.datasets

    kind: Callable[..., Any] = getattr(torchvision.datasets, name)
    accepted = inspect.signature(kind).parameters
    arguments: dict[str, object] = {}
    if config.split is not None and "split" in accepted:
        arguments["split"] = config.split
    elif config.split is not None:
        if config.split not in ("train", "test"):
            raise AtlasError(f"data.split={config.split!r} is unknown: {name} has train and test.")
        arguments["train"] = config.split == "train"
    if name == "Imagenette":
        present = [size for size in ("full", "320px", "160px") if (root / _imagenette_folder(size)).is_dir()]
        arguments["size"] = next(iter(present), "full")
    if name == "Places365":
        arguments["small"] = not any(root.glob("data_large*"))
    if "download" in accepted:
        arguments["download"] = config.download
        if name == "Imagenette" and (root / _imagenette_folder(str(arguments["size"]))).is_dir():
            arguments["download"] = False  # it refuses to download what is there
    try:
        if config.download:
            root.mkdir(parents=True, exist_ok=True)
        return kind(root, **arguments)
    except (RuntimeError, ValueError, OSError) as error:
        advice = "" if config.download else " With data.download=true it is downloaded to data.root."
        if config.download and isinstance(error, OSError):
            advice = " A download needs a connection to the Internet."
        raise AtlasError(f"data.name={name}, data.root={config.root}: {first_line(error)}.{advice}") from error


def _imagenette_folder(size: str) -> str:
    return "imagenette2" if size == "full" else f"imagenette2-{size.removesuffix('px')}"


def _imagenet(config: DataConfig, root: Path) -> Listing:
    """List ImageNet as a folder, which needs no object for each image; its classes are folders with numbers."""
    split = config.split or "train"
    if not (root / split).is_dir():
        raise AtlasError(
            f"data.name=imagenet: there is no folder {root / split}. Place the archives of ILSVRC2012 in {root}; with "
            "data.download=true torchvision verifies and unpacks them there. They cannot be downloaded freely."
        )
    listed = folder.list_images(dataclasses.replace(config, root=str(root / split)))
    names: dict[str, str] = {}
    try:
        from torchvision.datasets.imagenet import load_meta_file

        classes = load_meta_file(root)[0]
        names = dict(zip(classes, class_names(list(classes.values())), strict=True))
    except (RuntimeError, OSError, ValueError) as error:
        log.info("labels are the numbers of the classes, without their names: %s", first_line(error))
    table = ImageTable.of(listed.photos)
    return dataclasses.replace(listed, photos=table.renamed_labels(lambda label: names.get(label, label)))


def class_names(classes: Sequence[object]) -> list[str]:
    """Return a distinct text for each class; torchvision has tuples of synonyms for some."""
    firsts = [str(one[0]) if isinstance(one, tuple | list) else str(one) for one in classes]
    return [
        ", ".join(map(str, one)) if isinstance(one, tuple | list) and firsts.count(first) > 1 else first
        for one, first in zip(classes, firsts, strict=True)
    ]


def _labels_of(dataset: Any) -> Callable[[Any], str]:
    """Return a function from the class of an image to its name; the number, if the classes have no names."""
    names = class_names(list(getattr(dataset, "classes", None) or ()))

    def label(number: Any) -> str:
        value = int(np.asarray(number).reshape(-1)[0])
        return (names[value] if value < len(names) else str(value)) if value >= 0 else ""

    return label


def _from_files(name: str, dataset: Any, root: Path) -> Listing:
    """Return the files of a dataset, in its order."""
    pairs = next((getattr(dataset, attribute) for attribute in _PAIRS if hasattr(dataset, attribute)), None)
    paths = next((getattr(dataset, attribute) for attribute in _PATHS if hasattr(dataset, attribute)), None)
    if pairs is None and paths is not None and hasattr(dataset, _LABELS):
        pairs = zip(paths, getattr(dataset, _LABELS), strict=True)
    if pairs is None:
        raise AtlasError(f"data.name={name}: this version of torchvision keeps no list of its files.")
    label = _labels_of(dataset)

    def images() -> Iterator[DatasetImage]:
        for i, (path, number) in enumerate(pairs):
            relative = Path(path).relative_to(root).as_posix()
            yield DatasetImage(relative, label(number), i, size=file_size(path))

    return Listing(ImageTable.of(images()), {"": str(root)})


def _from_arrays(name: str, config: DataConfig, dataset: Any, root: Path) -> Listing:
    """Write the images of a dataset to an archive in `root`, unless it is there, and list it."""
    split = config.split or ("train" if getattr(dataset, "train", True) else "test")
    archive = root / f"neuron-atlas-{name.lower()}-{split}.tar"
    if not archive.is_file():
        log.info("%s is written, since %s has no files", archive, name)
        numbers = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        try:
            _write_archive(archive, np.asarray(dataset.data), numbers, _labels_of(dataset))
        except OSError as error:
            raise AtlasError(f"{archive} can't be written: {error.strerror or error}.") from error
    return webdataset.list_images(dataclasses.replace(config, source="webdataset", root=str(archive)))


def _write_archive(path: Path, images: np.ndarray, numbers: Sequence[Any], label: Callable[[Any], str]) -> None:
    """Write images (n, H, W), (n, H, W, C) or (n, C, H, W) as PNG, with their labels, in the WebDataset format."""
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    with atomic_path(path) as temporary, tarfile.open(temporary, "w") as archive:
        for i, (pixels, number) in enumerate(zip(images, numbers, strict=True)):
            buffer = io.BytesIO()
            # Not compressed: the size is then the same with every version of the library, and so is the fingerprint.
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
            for name, data in ((f"{i:06d}.png", buffer.getvalue()), (f"{i:06d}.cls", label(number).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
