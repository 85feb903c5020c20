"""The dataset pass against brute force on a real network, and photographs as people really have them."""

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PHOTOS, tiny_model
from PIL import Image

from pipeline import examples, photos
from pipeline.errors import AtlasError
from pipeline.examples import ExamplesConfig
from pipeline.folding import fold
from pipeline.layers import capture, enumerate_layers
from pipeline.models import Model, ModelConfig, Recipe, load
from pipeline.photos import DataConfig, Dataset, Photo

RECIPE = Recipe((32, 32), 36, (0.5,) * 3, (0.25,) * 3)


def test_the_pass_equals_brute_force(photo_folder: Path, tiny: Model) -> None:
    dataset = photos.listing(DataConfig("folder", str(photo_folder)))
    layers = [la for la in enumerate_layers(tiny) if la.name in ("stem", "late", "head")]
    config = ExamplesConfig(k=4, batch=6)
    found = examples.sweep(tiny, layers, dataset, 0, 20, config)
    arrays = [array for _, array, _ in photos.load(dataset, range(20), tiny.recipe)]
    images = torch.from_numpy(np.stack([a for a in arrays if a is not None])).float() / 255
    with capture(tiny, layers) as forward, torch.no_grad():
        seen = {k: v.numpy() for k, v in forward(images).items()}
    rng = np.random.default_rng(0)
    for layer in layers:
        for channel in rng.choice(layer.channels, 3, replace=False):
            maps = seen[layer.name][:, channel]
            peaks = maps.reshape(20, -1).max(1)
            order = sorted(range(20), key=lambda i: (-peaks[i], i))[:4]
            top = found.tops[layer.name]
            assert top.index[channel].tolist() == order
            assert top.value[channel] == pytest.approx(peaks[order], abs=1e-6)
            for rank, image in enumerate(order):
                y, x = np.unravel_index(maps[image].argmax(), maps[image].shape)
                assert (top.y[channel, rank], top.x[channel, rank]) == (y, x)
            statistics = found.tallies[layer.name].statistics()
            assert statistics["mean"][channel] == pytest.approx(maps.mean(), abs=1e-5)
            assert statistics["best_mean"][channel] == pytest.approx(maps.reshape(20, -1).mean(1).max(), abs=1e-5)


def test_the_default_networks_examples_are_exactly_those_of_brute_force() -> None:
    """Real weights, real photographs, units drawn at random: indices, places and values to the last bit."""
    model = load(ModelConfig("package", "efficientnet_lite0")).to("cpu")
    dataset = photos.listing(DataConfig(limit=48))
    wanted = ("conv_stem", "blocks.2.1.conv_dw", "blocks.4.2", "classifier")
    layers = [la for la in enumerate_layers(model) if la.name in wanted]
    config = ExamplesConfig(k=3, batch=16)
    found = examples.sweep(model, layers, dataset, 0, 48, config)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    arrays = [array for _, array, _ in photos.load(dataset, range(48), model.recipe) if array is not None]
    with capture(model, layers) as forward, torch.no_grad():
        for start in range(0, 48, 16):
            images = torch.from_numpy(np.stack(arrays[start : start + 16])).float() / 255
            for name, maps in forward(images).items():
                seen[name].append(maps.numpy().copy())
    rng = np.random.default_rng(1)
    for layer in layers:
        maps = np.concatenate(seen[layer.name])
        for channel in rng.choice(layer.channels, 8, replace=False):
            peaks = maps[:, channel].reshape(48, -1).max(1)
            best: dict[int, int] = {}
            for image in sorted(range(48), key=lambda i: (-peaks[i], i)):
                best.setdefault(dataset.photos[image].source, image)
            order = sorted(best.values(), key=lambda i: (-peaks[i], i))[:3]
            top = found.tops[layer.name]
            kept = [i for i in top.index[channel].tolist() if i >= 0]
            assert kept == order and top.value[channel, : len(order)].tolist() == peaks[order].tolist()
            for rank, image in enumerate(order):
                place = np.unravel_index(maps[image, channel].argmax(), maps.shape[2:])
                assert (top.y[channel, rank], top.x[channel, rank]) == place


def test_ranges_merge_to_the_whole(photo_folder: Path, tiny: Model) -> None:
    dataset = photos.listing(DataConfig("folder", str(photo_folder)))
    layers = [la for la in enumerate_layers(tiny) if la.name in ("stem", "head")]
    config = ExamplesConfig(k=5, batch=4)
    whole = examples.sweep(tiny, layers, dataset, 0, 20, config)
    names = [la.name for la in layers]
    parts = []
    for start, end in ((0, 8), (8, 12), (12, 20)):
        part = examples.sweep(tiny, layers, dataset, start, end, config)
        parts.append(examples.Sweep.from_arrays(names, part.arrays()))
    merged = examples.merge(parts, 5)
    for name in names:
        for key, array in whole.tops[name].arrays().items():
            assert np.array_equal(array, merged.tops[name].arrays()[key]), (name, key)


def test_a_source_picture_stands_once_in_a_list() -> None:
    dataset = photos.listing(DataConfig(limit=60))
    sources = {p.source for p in dataset.photos}
    model = tiny_model()
    layers = [la for la in enumerate_layers(model) if la.name == "late"]
    top = examples.sweep(model, layers, dataset, 0, 60, ExamplesConfig(k=8, batch=20)).tops["late"]
    for row in top.source:
        kept = row[row >= 0].tolist()
        assert len(kept) == len(set(kept)) == min(8, len(sources))


def test_default_photographs_are_some_hundreds() -> None:
    dataset = photos.listing(DataConfig())
    assert 300 <= len(dataset.photos) <= 600
    assert len({p.path for p in dataset.photos}) == len(dataset.photos)
    assert all(dataset.locate(p).is_file() for p in dataset.photos)


def test_shown_photographs_come_back_as_the_network_saw_them(photo_folder: Path) -> None:
    dataset = photos.listing(DataConfig("folder", str(photo_folder)))
    arrays = examples.shown(dataset, [7, 2], RECIPE, ExamplesConfig(jpeg_quality=95))
    assert arrays["index"].tolist() == [2, 7] and arrays["offset"][-1] == len(arrays["jpeg"])
    assert arrays["jpeg"][:2].tolist() == [0xFF, 0xD8]


def png_bomb(path: Path) -> None:
    """A small file that claims to be 60,000 × 60,000."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """One of everything that stands in real folders; names say what must happen."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    (tmp_path / "a" / "deep").mkdir(parents=True)
    rgb.save(tmp_path / "good.jpg")
    rgb.save(tmp_path / "a" / "good.jpg")
    rgb.save(tmp_path / "a" / "deep" / 'quote\'s "two" <script>.png')
    rgb.save(tmp_path / "good new\nline.png")
    rgb.convert("P").save(tmp_path / "good palette.png")
    rgb.convert("RGBA").save(tmp_path / "good alpha.png")
    rgb.convert("CMYK").save(tmp_path / "good cmyk.jpg")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(tmp_path / "good deep.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "good tiny.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "good turned.jpg", exif=exif)
    (tmp_path / "bad empty.jpg").write_bytes(b"")
    (tmp_path / "bad text.jpg").write_text("not a picture")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "bad short.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    Image.new("RGB", (20_000, 10)).save(tmp_path / "bad long.png")
    png_bomb(tmp_path / "bad bomb.png")
    (tmp_path / "notes.txt").write_text("not listed")
    return tmp_path


def test_odd_files_are_read_rightly_or_skipped_with_a_reason(odd_folder: Path) -> None:
    dataset = photos.listing(DataConfig("folder", str(odd_folder)))
    assert len(dataset.photos) == 16
    for index, array, reason in photos.load(dataset, range(16), RECIPE):
        path = dataset.photos[index].path
        if Path(path).name.startswith("bad"):
            assert array is None and reason, path
        else:
            assert array is not None and array.shape == (3, 32, 32), (path, reason)


def test_a_link_back_up_is_walked_once(odd_folder: Path) -> None:
    before = len(photos.listing(DataConfig("folder", str(odd_folder))).photos)
    (odd_folder / "a" / "up").symlink_to(odd_folder)
    assert len(photos.listing(DataConfig("folder", str(odd_folder))).photos) == before


def test_two_files_of_one_name_are_two_photographs(odd_folder: Path) -> None:
    found = [(p.path, p.label) for p in photos.listing(DataConfig("folder", str(odd_folder))).photos]
    assert ("good.jpg", "") in found and ("a/good.jpg", "a") in found
    assert [p for p, _ in found] == sorted(p for p, _ in found)


def test_sixteen_bits_are_scaled_not_clipped(odd_folder: Path) -> None:
    image = np.asarray(photos.read(odd_folder / "good deep.png", None, 3))
    assert image[0, 0].max() == 0 and 225 < image[-1, -1].max() < 240


def test_exif_turns_the_picture(odd_folder: Path) -> None:
    assert photos.read(odd_folder / "good turned.jpg", None, 3).size == (40, 60)


def test_grey_networks_get_grey_pictures(odd_folder: Path) -> None:
    grey = Recipe((32, 32), 36, (0.5,), (0.25,))
    assert photos.prepared(photos.read(odd_folder / "good.jpg", None, 1), grey).shape == (1, 32, 32)


def test_the_input_is_torchvisions_own(photo_folder: Path) -> None:
    from torchvision.transforms import v2

    image = photos.read(next(photo_folder.rglob("07.png")), None, 3)
    recipe = Recipe((32, 32), 36, (0.5,) * 3, (0.25,) * 3, "bicubic")
    theirs = v2.Compose([v2.Resize(36, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)])(image)
    assert np.array_equal(photos.prepared(image, recipe), np.asarray(theirs).transpose(2, 0, 1))


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="no image at all"):
        photos.listing(DataConfig("folder", str(tmp_path)))
    with pytest.raises(AtlasError, match="no such folder"):
        photos.listing(DataConfig("folder", str(tmp_path / "nowhere")))
    with pytest.raises(AtlasError, match=r"needs data\.root"):
        photos.listing(DataConfig("folder"))
    with pytest.raises(AtlasError, match="Nearest: folder"):
        photos.listing(DataConfig("folde"))


def test_all_unreadable_is_no_crash(tmp_path: Path, tiny: Model) -> None:
    (tmp_path / "x.jpg").write_text("no")
    dataset = Dataset((Photo("x.jpg", "", 0),), {"": str(tmp_path)})
    layers = [la for la in enumerate_layers(tiny) if la.name == "stem"]
    found = examples.sweep(tiny, layers, dataset, 0, 1, ExamplesConfig())
    assert found.failed[0][0] == 0 and (found.tops["stem"].index == -1).all()


@pytest.mark.photos
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the ImageNet photographs are not beside this checkout")
def test_the_default_network_is_right_on_imagenet_photographs() -> None:
    """85.3 % with the right input recipe; ImageNet's usual mean and std lose about 8 points."""
    model = fold(load(ModelConfig("package", "efficientnet_lite0")).to("cpu"))
    dataset = photos.listing(DataConfig("folder", str(PHOTOS)))
    labels = sorted({p.label for p in dataset.photos})
    assert len(labels) == 1000
    right, failed = 0, []
    loaded = photos.load(dataset, range(len(dataset.photos)), model.recipe)
    with torch.no_grad():
        for indices, batch in photos.batches(loaded, 50, failed):
            images = (torch.from_numpy(batch).float() / 255).contiguous(memory_format=torch.channels_last)
            logits = model.module(model.normalise(images))
            truth = [labels.index(dataset.photos[i].label) for i in indices]
            right += int((logits.argmax(1) == torch.tensor(truth)).sum())
    logging.getLogger(__name__).info("right on %d of 1000 photographs", right)  # shown by --log-cli-level=INFO
    assert not failed and right >= 840
