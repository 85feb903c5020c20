"""ONNX Runtime Web, which runs a network in the browser: two files of its npm package, fetched once and checked.

The package has the MIT license. It is not a part of this program: `find_files` takes it from a folder of the user, from
the user's cache, or from the npm registry.
"""

import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import AtlasError, first_line
from pipeline.core.machine import cache_folder

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# Integrity of the package as npm states it: base64 of the sha512 of the archive.
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
MODULE, BINARY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
# sha256 of the files in the folder `dist` of the package.
FILES = {
    MODULE: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    BINARY: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
# Folders of these files below a folder that the user names.
PLACES = ("", "dist", "package/dist", f"node_modules/{PACKAGE}/dist")
TIMEOUT = 60.0

LICENSE = f"""ONNX Runtime Web {VERSION} (npm package {PACKAGE}), https://github.com/microsoft/onnxruntime
The files runtime.js and wasm-*.js contain it: the module as a classic script, the binary compressed, as base64.
Licenses of the code that it contains: ThirdPartyNotices.txt of that repository, at the tag v{VERSION}.

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def find_files(folder: str | None) -> dict[str, bytes]:
    """Return the files of `FILES` by name.

    Args:
        folder: Folder with the unpacked package; None for the copy in the user's cache, which is fetched if needed.

    Raises:
        AtlasError: If a file is missing or is that of another version, or the package cannot be fetched.
    """
    if folder is not None:
        root = Path(folder).expanduser()
        for place in PLACES:
            if all((root / place / name).is_file() for name in FILES):
                return _checked(
                    {name: (root / place / name).read_bytes() for name in FILES}, f"site.onnxruntime={folder}"
                )
        raise AtlasError(
            f"site.onnxruntime={folder} has no {' and '.join(FILES)}, nor has a folder dist in it. "
            f"Unpack {PACKAGE} {VERSION} there: npm pack {PACKAGE}@{VERSION}"
        )
    try:
        cache = cache_folder(f"{PACKAGE}-{VERSION}")
        if all((cache / name).is_file() for name in FILES):
            return _checked({name: (cache / name).read_bytes() for name in FILES}, str(cache))
    except OSError as error:
        raise AtlasError(f"The cache for {PACKAGE} can't be used: {first_line(error)}") from error
    files = _checked(unpack(_fetch()), f"{PACKAGE} {VERSION}")
    for name, content in files.items():
        with atomic_path(cache / name) as temporary:
            temporary.write_bytes(content)
    return files


def unpack(archive: bytes) -> dict[str, bytes]:
    """Return the files of `FILES` from the archive of the package.

    Raises:
        AtlasError: If the archive has another content than that of the version.
    """
    integrity = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if integrity != INTEGRITY:
        raise AtlasError(
            f"{PACKAGE} {VERSION} was fetched with the integrity sha512-{integrity}; expected is sha512-{INTEGRITY}."
        )
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        members = {name: tar.extractfile(f"package/dist/{name}") for name in FILES}
        return {name: member.read() for name, member in members.items() if member is not None}


def classic_script(module: str) -> str:
    """Return the module as a script that registers its exports: pages from disk can load no modules.

    Raises:
        AtlasError: If it does not end with one list of exports.
    """
    body, _, rest = module.rpartition("export{")
    match = re.fullmatch(r"([\w$ ,]+)\};\s*(//# sourceMappingURL=\S+\s*)?", rest)
    if match is None or "ATLAS" in body:
        raise AtlasError(f"{MODULE} has another form than that of {PACKAGE} {VERSION}.")
    pairs = [pair.split(" as ") for pair in match[1].split(",")]
    exports = ",".join(
        f"{public}:{local}" for local, public in pairs if public in ("InferenceSession", "Tensor", "env")
    )
    body = body.replace("import.meta.url", "ORT_URL")
    # Firefox gives pages from disk the origin "null", which the module would take for the base of an address.
    location = '{origin:window.location.origin==="null"?void 0:window.location.origin,href:window.location.href}'
    return (
        f'(function(){{"use strict";const ORT_URL=document.currentScript.src,location={location};\n{body}\n'
        f'ATLAS.put("own-image/runtime",{{{exports}}});}})();\n'
    )


def _checked(files: Mapping[str, bytes], place: str) -> dict[str, bytes]:
    for name, digest in FILES.items():
        if hashlib.sha256(files.get(name, b"")).hexdigest() != digest:
            raise AtlasError(f"{place}: {name} is not that of {PACKAGE} {VERSION}. Delete it, or unpack that version.")
    return dict(files)


def _fetch() -> bytes:
    """Return the archive of the package, by npm if it is installed, which knows registries, proxies and passwords.

    Raises:
        AtlasError: If it cannot be fetched.
    """
    npm = shutil.which("npm")
    try:
        return _fetch_by_npm(npm) if npm else _fetch_directly()
    except (OSError, subprocess.SubprocessError, urllib.error.URLError) as error:
        said = getattr(error, "stderr", "") or ""
        reason = next((line for line in said.splitlines() if line.strip()), first_line(error))
        raise AtlasError(
            f"{PACKAGE} {VERSION} can't be fetched from the npm registry: {reason} On a machine that reaches it, type "
            f"`npm pack {PACKAGE}@{VERSION}`, unpack the archive here, and set site.onnxruntime=FOLDER."
        ) from error


def _fetch_by_npm(npm: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--silent", "--pack-destination", folder]
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, timeout=10 * TIMEOUT)
        return next(Path(folder).glob("*.tgz")).read_bytes()


def _fetch_directly() -> bytes:
    variables = {name.lower(): value for name, value in os.environ.items()}
    registry = variables.get("npm_config_registry", "")
    if not registry:
        raise OSError("npm is not installed, and the variable npm_config_registry names no registry.")
    if not registry.startswith(("https://", "http://")):
        raise OSError(f"the registry {registry} is no address of the web.")
    address = f"{registry.rstrip('/')}/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
        return answer.read()
