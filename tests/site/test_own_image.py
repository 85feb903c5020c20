"""The page of one's own image without a browser: the exported network, the library from npm, the files."""

import base64
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import re
import shutil
import tarfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_site import SMALL, Page, shard, write_atlas

from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.layers.finding import enumerate_layers
from pipeline.models.loading import Model
from pipeline.site.build import build_site
from pipeline.site.hosting.hosts import HEADERS
from pipeline.site.own_image import files, onnx_export, runtime
from pipeline.site.own_image.network import OnnxNetwork, Tap
from pipeline.store.layer_view import Histogram
from pipeline.store.reader import open_atlas

# As layers in test_site, of the network of conftest.
TINY_LAYERS = (
    ("stem", "conv", 6, (0, 1, 2, 3, 4, 5), 16, 3, 32, 3),
    ("late", "conv", 8, (1, 4, 6), 8, 15, 32, 3),
    ("head", "linear", 5, (0, 1, 2, 3, 4), 1, 0, 32, 3),
)
MODULE = """var a=import.meta.url,b=1,c=2;export{a as InferenceSession,b as Tensor,c as env,c as default};
//# sourceMappingURL=x.map
"""
LIBRARY = {runtime.MODULE: MODULE.encode(), runtime.BINARY: bytes(range(256)) * 40}


@pytest.fixture(scope="module")
def atlas_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("tiny") / "atlas.h5", layers=TINY_LAYERS)


def atlas_model(**changes: Any) -> Model:
    """The network that the atlas says it is of."""
    return dataclasses.replace(tiny_model(), **({"digest": "ab" * 32} | changes))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of two small files, which is what the package is taken to contain."""
    monkeypatch.setattr(runtime, "FILES", {name: hashlib.sha256(data).hexdigest() for name, data in LIBRARY.items()})


def network_of(model: Model) -> OnnxNetwork:
    taps = (Tap("stem", "layer_0", True), Tap("head", "layer_1", False))
    return OnnxNetwork(b"onnx" * 99, taps, ("late",), model.preprocessing, model.labels, 0.001)


def build(path: Path, folder: Path, export=None, **settings: Any):
    with open_atlas(path) as atlas:
        return build_site(atlas, folder, dataclasses.replace(SMALL, **settings), export=export)


def test_without_the_setting_there_is_no_page(atlas_file, tmp_path):
    report = build(atlas_file, tmp_path / "site")
    assert not report.own_image.missing and not (tmp_path / "site/own-image.html").exists()
    assert not any("own-image" in (a["href"] or "") for a in Page(tmp_path / "site/index.html").all("a") if "href" in a)


def test_what_cannot_be_made_is_said_and_the_site_is_built(atlas_file, tmp_path, library):
    folder = tmp_path / "package/dist"
    folder.mkdir(parents=True)
    for name, content in LIBRARY.items():
        (folder / name).write_bytes(content)

    def refuse(_atlas):
        raise AtlasError("it has no weights")

    settings = {"own_image": True, "onnxruntime": str(tmp_path)}
    assert build(atlas_file, tmp_path / "site", refuse, **settings).own_image.missing == "it has no weights"
    assert "was not given" in build(atlas_file, tmp_path / "site", **settings).own_image.missing
    assert not (tmp_path / "site/own-image.html").exists() and (tmp_path / "site/index.html").is_file()
    assert "own-image" not in (tmp_path / "site/index.html").read_text()


def test_the_page_and_its_files(atlas_file, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "find_files", lambda _folder: LIBRARY)
    monkeypatch.setattr(files, "PART", 400)
    site, calls = tmp_path / "site", []

    def export(_atlas):
        calls.append(1)
        return network_of(atlas_model())

    report = build(atlas_file, site, export, own_image=True)
    assert "late" in " ".join(report.own_image.notes) and "0.001" in " ".join(report.own_image.notes)
    assert "own-image.html" in [a.get("href") for a in Page(site / "index.html").all("a")]
    policies = {
        name: next(a["content"] for a in Page(site / name).all("meta") if a.get("http-equiv"))
        for name in ("own-image.html", "index.html")
    }
    assert policies["own-image.html"] != policies["index.html"] and "wasm" not in str(policies["index.html"])
    assert "'wasm-unsafe-eval'" in str(policies["own-image.html"]) and "connect" not in str(policies["own-image.html"])
    assert f"{policies['own-image.html']}; frame-ancestors 'self'" in HEADERS.partition("/own-image.html")[2]
    index = shard(site, "own-image/index")
    assert index["layers"] == [["stem", "layer_0", True], ["head", "layer_1", False]]
    assert (index["size"], index["resize"], index["interpolation"]) == ([32, 32], 32, "bilinear")
    for name, content in (("wasm", LIBRARY[runtime.BINARY]), ("network", b"onnx" * 99)):
        parts = [shard(site, f"own-image/{name}-{i}") for i in range(index["parts"][name])]
        assert all(len(part) <= 400 for part in parts)
        assert gzip.decompress(b"".join(map(base64.b64decode, parts))) == content
    assert "Copyright (c) Microsoft" in (site / "data/own-image/LICENSE.txt").read_text()
    before = {path.name: path.read_bytes() for path in (site / "data/own-image").iterdir()}
    build(atlas_file, site, export, own_image=True)
    assert len(calls) == 1, "the network is exported once"
    assert before == {path.name: path.read_bytes() for path in (site / "data/own-image").iterdir()}
    build(atlas_file, site)
    assert not (site / "data/own-image").exists() and not (site / "own-image.html").exists()


def test_the_scripts_count_in_the_size_of_the_site(atlas_file, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "find_files", lambda _folder: LIBRARY)
    big = np.random.default_rng(0).bytes(9_500_000)
    network = dataclasses.replace(network_of(atlas_model()), content=big)
    limits = {"max_bytes": 12_000_000}
    assert build(atlas_file, tmp_path / "without", **limits).level == 0
    assert build(atlas_file, tmp_path / "with", lambda _: network, own_image=True, **limits).level > 0


def test_shares_are_the_inverse_of_quantiles(atlas_file):
    with open_atlas(atlas_file) as atlas:
        layer = atlas["late"]
        histogram = layer.histogram()
        assert histogram is not None
        wanted = np.linspace(0.05, 0.95, 7)
        for row, values in enumerate(layer.quantiles(wanted.tolist())):
            first, shares = files.cumulative_shares(histogram, row)
            assert shares[0] == 0 and shares[-1] == 1 and len(shares) < 258
            low, high = histogram.ends[row]
            borders = np.clip([low, *histogram.edges[row], high], low, high)[first : first + len(shares)]
            np.testing.assert_allclose(np.interp(values, borders, shares), wanted, atol=1e-6)


def test_shares_leave_out_bins_without_images():
    counts = np.array([[0, 0, 3, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    edges, none = np.tile(np.arange(7.0), (2, 1)), np.zeros(2, int)
    histogram = Histogram(counts, edges, none, none, np.array([[2.5, 4.5], [np.nan, np.nan]]))
    first, shares = files.cumulative_shares(histogram, 0)
    assert (first, shares.tolist()) == (3, [0, 0.75, 0.75, 1])
    assert files.cumulative_shares(histogram, 1)[1].tolist() == [0]


def test_a_module_becomes_a_classic_script():
    script = runtime.classic_script(MODULE)
    assert "import.meta" not in script and not re.search(r"\bexport\b", script)
    assert script.endswith('ATLAS.put("own-image/runtime",{InferenceSession:a,Tensor:b,env:c});})();\n')
    with pytest.raises(AtlasError, match="another form"):
        runtime.classic_script("export default 1")


def test_a_folder_with_the_library(tmp_path, library):
    with pytest.raises(AtlasError, match="npm pack"):
        runtime.find_files(str(tmp_path))
    (tmp_path / "dist").mkdir()
    for name, content in LIBRARY.items():
        (tmp_path / "dist" / name).write_bytes(content)
    assert runtime.find_files(str(tmp_path)) == LIBRARY
    (tmp_path / "dist" / runtime.BINARY).write_bytes(b"another")
    with pytest.raises(AtlasError, match="is not that of"):
        runtime.find_files(str(tmp_path))


@functools.cache
def packed() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in (LIBRARY | {"../evil": b"x"}).items():
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry on this machine, and the addresses that it was asked for; npm is not installed."""
    archive, asked = packed(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(urllib.parse.urlsplit(self.path).path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive)))
            self.end_headers()
            self.wfile.write(archive)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/npm")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


def test_the_library_is_fetched_once_and_checked(registry, library, tmp_path, monkeypatch):
    with pytest.raises(AtlasError, match="integrity"):
        runtime.find_files(None)
    monkeypatch.setattr(runtime, "INTEGRITY", base64.b64encode(hashlib.sha512(packed()).digest()).decode())
    assert runtime.find_files(None) == LIBRARY
    assert runtime.find_files(None) == LIBRARY
    assert registry == [f"/npm/onnxruntime-web/-/onnxruntime-web-{runtime.VERSION}.tgz"] * 2
    cache = tmp_path / f"cache/neuron-atlas/onnxruntime-web-{runtime.VERSION}"
    assert sorted(path.name for path in cache.iterdir()) == sorted(LIBRARY)


def test_without_a_registry_it_is_said_what_to_do(tmp_path, monkeypatch, library):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(AtlasError, match=r"site\.onnxruntime=FOLDER"):
        runtime.find_files(None)


def test_relative_errors():
    one = np.array([0.0, 1.0, 4.0])
    assert onnx_export.relative_error(one, one) == 0
    assert onnx_export.relative_error(one, one + 0.04) == pytest.approx(0.01)
    assert onnx_export.relative_error(one, np.array([0, 1, np.nan])) == np.inf
    assert onnx_export.relative_error(one, one[:2]) == np.inf


def exported(model: Model, path: Path) -> OnnxNetwork:
    pytest.importorskip("onnx")
    with open_atlas(path) as atlas:
        return onnx_export.export_network(model, enumerate_layers(model), atlas)


def test_the_exported_network_has_the_maps_of_the_units(atlas_file):
    model = atlas_model()
    network = exported(model, atlas_file)
    assert [tap.layer for tap in network.taps] == ["stem", "late", "head"] and not network.skipped
    assert [tap.spatial for tap in network.taps] == [True, True, False] and network.labels == tuple("abcde")
    onnx = pytest.importorskip("onnx")
    graph = onnx.load_from_string(network.content).graph
    shapes = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.output}
    assert shapes == {"layer_0": [1, 6, 16, 16], "layer_1": [1, 3, 8, 8], "layer_2": [1, 5, 1, 1], "classes": [1, 5]}
    assert str(Path.cwd()).encode() not in network.content
    pytest.importorskip("onnxruntime")
    assert network.error is not None and network.error < 1e-4


def test_a_network_that_differs_is_refused(atlas_file, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(AtlasError, match="differs"):
        exported(atlas_model(), atlas_file)


def test_networks_that_are_refused(atlas_file):
    with pytest.raises(AtlasError, match=r"is not that of the atlas.*run\.trust=true"):
        exported(atlas_model(digest="cd" * 32), atlas_file)

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0e(x)

    model = atlas_model()
    model.module.relu = Odd()
    with pytest.raises(AtlasError, match="can't be exported as ONNX"):
        exported(model, atlas_file)


def test_without_the_package_it_is_said_how_to_get_it(atlas_file, monkeypatch):
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda _name: None)
    with open_atlas(atlas_file) as atlas, pytest.raises(AtlasError, match=r"neuron-atlas\[onnx\]"):
        onnx_export.export_network(atlas_model(), [], atlas)


def test_the_network_of_a_run_folder_is_loaded_only_if_it_is_trusted(finished, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    monkeypatch.setattr(runtime, "find_files", lambda _folder: LIBRARY)
    settings = ["site.own_image=true", "site.workers=1"]
    assert main(["site", str(finished), *settings]) == 0
    assert "is not that of the atlas" in capsys.readouterr().err
    assert not (finished / "site/own-image.html").exists()
    assert main(["site", str(finished), *settings, "run.trust=true"]) == 0
    assert (finished / "site/own-image.html").is_file()


def test_a_run_makes_the_page_once_it_can(finished, tiny_run, monkeypatch, capsys):
    pytest.importorskip("onnx")

    def refuse(_folder: str | None) -> dict[str, bytes]:
        raise AtlasError("there is no registry")

    monkeypatch.setattr(runtime, "find_files", refuse)
    command = ["run", *tiny_run, "site.own_image=true", "site.workers=1"]
    assert main(command) == 0
    assert "no page own-image.html: there is no registry" in capsys.readouterr().err
    assert (finished / "site/index.html").is_file() and not (finished / "site/own-image.html").exists()
    monkeypatch.setattr(runtime, "find_files", lambda _folder: LIBRARY)
    assert main(command) == 0 and (finished / "site/own-image.html").is_file()
