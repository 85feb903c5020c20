"""CLIP-Dissect, embeddings that are kept, and search, with a tiny CLIP made here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clip import COLORS, EACH, WORDS, K, colored, write_color_atlas

from pipeline import open_atlas
from pipeline.core.errors import AtlasError
from pipeline.names import dissect, scores
from pipeline.names.book import NameBook, earned_words
from pipeline.names.clip_model import ClipModel, find_folder
from pipeline.names.clip_names import find_clip_names, read_clip_names
from pipeline.names.embeddings import CropEmbeddings
from pipeline.names.examine import examine, read_words

transformers = pytest.importorskip("transformers")


def test_embeddings_are_those_of_transformers(clip: ClipModel, clip_folder: Path) -> None:
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    images = [colored(name, 3).resize((16, 16)) for name in WORDS]
    pixels = np.stack([(np.asarray(image, np.float32) / 255 - 0.5) / 0.25 for image in images]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        out = model(pixel_values=torch.from_numpy(pixels), **tokenizer(WORDS, padding=True, return_tensors="pt"))
    assert np.allclose(clip.images(images), out.image_embeds, atol=1e-5)
    assert np.allclose(clip.texts(WORDS), out.text_embeds, atol=1e-5)
    assert (clip.images(images) @ clip.texts(WORDS).T).argmax(1).tolist() == list(range(6))


def test_soft_wpmi_is_that_of_the_paper() -> None:
    """The formula in plain Python, one number at a time."""
    rng = np.random.default_rng(0)
    images, words = rng.normal(size=(3, 4, 5)), rng.normal(size=(7, 5))
    images /= np.linalg.norm(images, axis=2, keepdims=True)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    expected = np.zeros((3, 7))
    for unit in range(3):
        for rank in range(4):
            logits = np.exp(10 * words @ images[unit, rank])
            member = 0.998 - rank / 4 * (0.998 - 0.97)
            for t in range(7):
                expected[unit, t] += np.log(1 + member * (logits[t] / logits.sum() - 1) + 1e-7)
    prior = np.log(np.exp(expected).mean(0))
    found = dissect.soft_wpmi(images.astype(np.float32), words.astype(np.float32))
    assert found == pytest.approx(expected - prior, abs=1e-4)


def test_blocks_change_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    images, words = rng.normal(size=(9, 3, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    images /= np.linalg.norm(images, axis=2, keepdims=True)
    images[2], images[4, 1:] = 0, 0
    whole = dissect.name_by_words(images, words, "a")
    assert whole.word[2] == -1 and np.isnan(whole.score[2]) and whole.p[2] == 1
    monkeypatch.setattr(dissect, "BLOCK", 40)
    monkeypatch.setattr(dissect, "KEPT", 0)
    parts = dissect.name_by_words(images, words, "a")
    assert np.array_equal(whole.word, parts.word) and whole.score == pytest.approx(parts.score, nan_ok=True, abs=1e-4)
    assert dissect.name_by_words(np.zeros((2, 3, 4), np.float32), words, "a").word.tolist() == [-1, -1]


def test_units_are_named_by_their_color_and_random_ones_are_not(tmp_path: Path, clip: ClipModel) -> None:
    path = write_color_atlas(tmp_path / "atlas.h5", mixed=6)
    with open_atlas(path) as atlas:
        names, made = examine(atlas, clip, WORDS)
        assert made == len({*atlas["late"].examples("max").index.ravel().tolist()})
        book = NameBook(atlas)
        found = book.names(atlas["late"])
        assert [earned_words(one) for one in found[:6]] == [[color] for color in COLORS]
        assert not any(earned_words(one) for one in found[6:])
        assert found[0][0].author == "CLIP-Dissect, tiny-clip" and found[0][0].q <= 0.05
        assert read_clip_names(find_clip_names(tmp_path)[0]).words == names.words
        # A unit of one color says one thing, one of random images several.
        assert names.clarity[:6].min() > names.clarity[6:].max()
        assert names.polysemanticity[:6].max() < names.polysemanticity[6:].min()
        near = [unit for unit in names.search_units[names.search_words.index("blue")].tolist() if unit >= 0]
        assert near[0] == list(COLORS).index("blue")


def test_what_is_kept_is_not_embedded_again(tmp_path: Path, clip: ClipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_color_atlas(tmp_path / "atlas.h5")
    with open_atlas(path) as atlas:
        _, made = examine(atlas, clip, WORDS)
        crops, layer = CropEmbeddings(atlas, clip.key), atlas["late"]
        before = crops.of(layer)
        assert before.shape == (8, K, 16) and np.linalg.norm(before, axis=2) == pytest.approx(1)
        assert examine(atlas, clip, WORDS[:3])[1] == 0
        # Half of the file is lost: only that half is made again.
        kept = crops.kept(layer)
        crops._write(layer, dict(list(kept.items())[: made // 2]))
        assert CropEmbeddings(atlas, clip.key).embed(clip) == made - made // 2
        assert np.allclose(crops.of(layer), before)
        for damaged in (b"PK damaged", crops.file(layer).read_bytes()[:300], b""):
            crops.file(layer).write_bytes(damaged)
            assert CropEmbeddings(atlas, clip.key).embed(clip) == made


def test_an_interruption_loses_no_finished_crop(
    tmp_path: Path, clip: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.names import embeddings

    monkeypatch.setattr(embeddings, "_AT_ONCE", 4)
    monkeypatch.setattr(embeddings, "_BETWEEN_WRITES", 8)
    calls = iter(range(100))

    class Stops:
        key = clip.key

        def images(self, images):
            if next(calls) == 4:
                raise KeyboardInterrupt
            return clip.images(images)

    with open_atlas(write_color_atlas(tmp_path / "atlas.h5")) as atlas:
        total = len({*atlas["late"].examples("max").index.ravel().tolist()})
        with pytest.raises(KeyboardInterrupt):
            CropEmbeddings(atlas, clip.key).embed(Stops())  # type: ignore[arg-type]
        assert CropEmbeddings(atlas, clip.key).embed(clip) == total - 16


def test_results_of_other_examples_are_left_out(tmp_path: Path, clip: ClipModel) -> None:
    path = write_color_atlas(tmp_path / "atlas.h5")
    with open_atlas(path) as atlas:
        examine(atlas, clip, WORDS)
    path.unlink()
    write_color_atlas(path, order=tuple(reversed(COLORS)))
    with open_atlas(path) as atlas:
        assert not any(NameBook(atlas).names(atlas["late"])) and not any(NameBook(atlas).meanings(atlas["late"]))


def test_an_atlas_without_images_is_refused(tmp_path: Path, clip: ClipModel) -> None:
    import h5py

    path = write_color_atlas(tmp_path / "atlas.h5")
    with h5py.File(path, "r+") as file:
        file["dataset/shown"].attrs["store"] = "ids"
    with open_atlas(path) as atlas, pytest.raises(AtlasError, match=r"examples\.store=crops"):
        examine(atlas, clip, WORDS)


def test_folders_that_are_no_model_are_refused(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(AtlasError, match="neither a folder nor an installed package"):
        ClipModel("openai/clip-vit-base-patch32")
    with pytest.raises(AtlasError, match=r"no config\.json"):
        ClipModel(str(tmp_path))
    pickled = Path(shutil.copytree(clip_folder, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(AtlasError, match=r"no \*\.safetensors.*can execute code"):
        ClipModel(str(pickled))
    broken = Path(shutil.copytree(clip_folder, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(AtlasError, match="can't be loaded"):
        ClipModel(str(broken))


def test_nothing_of_the_folder_is_executed(tmp_path: Path, clip_folder: Path) -> None:
    """A folder that names code of its own is not asked for it."""
    folder = Path(shutil.copytree(clip_folder, tmp_path / "hostile"))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Mine: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        tree = json.loads((folder / name).read_text())
        tree["auto_map"] = {"AutoModel": "mine.Mine", "AutoConfig": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}
        (folder / name).write_text(json.dumps(tree))
    try:
        ClipModel(str(folder))
    except AtlasError as error:
        assert "can't be loaded" in str(error)
    assert not (tmp_path / "executed").exists()


def test_an_installed_package_is_found_without_an_import(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_clip_package"
    shutil.copytree(clip_folder, package / "weights" / "small")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_folder("some_clip_package") == package / "weights" / "small"


def test_word_lists(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeff red \n\nlight  green\nred\n")
    assert read_words(path) == ["red", "light green"]
    for text, message in (("red\n", "at least two"), ("red\na\x00b\n", "line 2"), ("x" * 300 + "\nred", "line 1")):
        path.write_text(text)
        with pytest.raises(AtlasError, match=message):
            read_words(path)
    with pytest.raises(AtlasError, match="can't be read"):
        read_words(tmp_path / "none.txt")


def test_scores_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(2)
    images = rng.normal(size=(4, 6, 3))
    images /= np.linalg.norm(images, axis=2, keepdims=True)
    images[1, 4:] = 0
    pairs = [
        [a @ b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j and a.any() and b.any()]
        for unit in images
    ]
    assert scores.clarity(images) == pytest.approx([np.mean(one) for one in pairs])
    assert np.isnan(scores.clarity(images[:, :1])).all()
    # Two clusters at a right angle, and one direction.
    axes = np.eye(3)
    split = np.stack([axes[[0, 0, 0, 1, 1, 1]], axes[[0] * 6]])
    assert scores.polysemanticity(split) == pytest.approx([1, 0], abs=1e-9)
    assert np.isnan(scores.polysemanticity(split[:, :3])).all()
    # A single image of another direction is no second meaning: the mean cosine with the mean of all decides.
    odd = axes[[0, 0, 0, 0, 0, 1]]
    mean = odd.mean(0) / np.linalg.norm(odd.mean(0))
    assert scores.polysemanticity(odd[None]) == pytest.approx(1 - (odd @ mean).mean())


def test_nearest_units_and_redundancy(monkeypatch: pytest.MonkeyPatch) -> None:
    units = np.array([[1, 0], [0.8, 0.6], [0, 1], [0, 0]], np.float32)
    near = scores.nearest(units)
    assert near.unit.tolist() == [1, 0, 1, -1] and near.similarity[:3] == pytest.approx([0.8, 0.8, 0.6])
    assert near.mean == pytest.approx(np.mean([0.8, 0.8, 0.6]))
    others = scores.nearest(units, np.array([[0, 0], [0, 1]], np.float32))
    assert others.unit.tolist() == [1, 1, 1, -1] and others.similarity[:3] == pytest.approx([0, 0.6, 1])
    assert scores.nearest(units[:1]).unit.tolist() == [-1]
    monkeypatch.setattr(scores, "ROWS", 1)
    assert scores.nearest(units).unit.tolist() == [1, 0, 1, -1]
    numbers, cosines = scores.ranked(np.array([[0, 1]], np.float32), units, 5)
    assert numbers.tolist() == [[2, 1, 0, -1, -1]] and np.isnan(cosines[0, 3:]).all()


def test_units_that_stand_out_for_a_word() -> None:
    """One of forty units is near to the first query; to the second all are equally near."""
    rng = np.random.default_rng(5)
    units = np.concatenate([np.tile([[0, 1, 0]], (39, 1)) + rng.normal(0, 0.01, (39, 3)), [[1, 1, 0]], [[0, 0, 0]]])
    queries = np.array([[1, 0, 0], [0, 0, 0]])
    numbers, cosines = scores.outstanding(queries.astype(np.float32), units.astype(np.float32), 5)
    assert numbers[0].tolist() == [39, -1, -1, -1, -1] and np.isnan(cosines[0, 1:]).all()
    deviation = (queries[0] @ units[:40].T).std()
    assert cosines[0, 0] >= (queries[0] @ units[:40].T).mean() + 2 * deviation


def test_the_search_finds_more_than_the_color_of_a_unit(clip: ClipModel) -> None:
    images = clip.images([colored(name, seed) for name in COLORS for seed in range(EACH)]).reshape(6, EACH, -1)
    numbers, _ = scores.ranked(clip.texts(["blue"]), scores.semantic_embeddings(images), 2)
    assert list(COLORS)[numbers[0, 0]] == "blue"
    numbers, _ = scores.ranked(clip.images([colored("yellow", 99)]), scores.semantic_embeddings(images), 2)
    assert list(COLORS)[numbers[0, 0]] == "yellow"
