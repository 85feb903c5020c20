"""Building the static site of a run."""

import dataclasses
import logging
import time

from pipeline.config.schema import Config
from pipeline.core import hashing
from pipeline.core.errors import AtlasError, first_line
from pipeline.core.formatting import clock
from pipeline.core.source import package_digest
from pipeline.layers.selection import list_layers
from pipeline.models.loading import load_model
from pipeline.names.book import NameBook, names_digest
from pipeline.planning.folder import RunFolder, write_text
from pipeline.planning.request import Request
from pipeline.site.build import build_site as write_site
from pipeline.site.context.families import find_families
from pipeline.site.own_image.network import OnnxNetwork
from pipeline.site.own_image.onnx_export import export_network
from pipeline.store import writer
from pipeline.store.reader import Atlas, open_atlas

log = logging.getLogger(__name__)

# File in the run folder with the digest of what its site was built from.
MARK = ".site"


def refresh_site(request: Request, folder: RunFolder) -> None:
    """Build the site, unless it was built from this atlas, these settings and files, and this version of the code."""
    families = find_families(request.config.site.families, folder.path)
    state = hashing.digest_of(
        {
            "atlas": writer.read_identity(folder.atlas),
            "settings": dataclasses.asdict(request.config.site),
            "names": names_digest(folder.path),
            "families": families.read_bytes().hex() if families and families.is_file() else "",
            "code": package_digest(),
        }
    )
    mark = folder.path / MARK
    if mark.is_file() and mark.read_text() == state and (folder.site / "index.html").is_file():
        return
    if build_site(request, folder):
        write_text(mark, state)


def build_site(request: Request, folder: RunFolder, network: Config | None = None) -> bool:
    """Build the site from atlas.h5, and log its progress and where it can be hosted.

    Args:
        request: What to build.
        folder: The run folder.
        network: Configuration of the network that `site.own_image` exports; that of the request by default.

    Returns:
        Whether the site has all pages that were asked for.
    """
    config = request.config
    began = logged_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal logged_at
        now = time.monotonic()
        if now - logged_at >= config.engine.progress_seconds and done < total:
            logged_at = now
            log.info("site: %d of %d units, %.0f/s", done, total, done / max(now - began, 1e-6))

    with open_atlas(folder.path) as atlas:
        _report_absent(NameBook(atlas))
        report = write_site(atlas, folder.site, config.site, progress, lambda a: _exported(network or config, a))
    (folder.path / MARK).unlink(missing_ok=True)
    reused = report.units - report.rebuilt_units
    note = f", {reused} of them unchanged" if reused else ""
    seconds = clock(time.monotonic() - began)
    log.info("site: %d units of %d layers in %s%s", report.units, report.layers, seconds, note)
    if report.level:
        log.info("site: image sizes were reduced %d of 4 steps to fit into site.max_bytes", report.level)
    for line in report.host.lines():
        log.info("%s", line)
    if report.bytes > config.site.max_bytes or report.files > config.site.max_files:
        log.warning("The site is larger than site.max_bytes or site.max_files, even at its smallest sizes")
    for note in report.own_image.notes:
        log.info("own-image.html: %s", note)
    if report.own_image.missing:
        log.warning("The site has no page own-image.html: %s", report.own_image.missing)
    log.info("open %s", folder.site / "index.html")
    return not report.own_image.missing


def _report_absent(book: NameBook) -> None:
    """Log the units of names.csv that the atlas does not have."""
    absent = book.absent()
    if absent:
        some = ", ".join(map(str, absent[:5])) + (", …" if len(absent) > 5 else "")
        log.warning("names.csv has %d units that are not in the atlas, which no page shows: %s", len(absent), some)


def _exported(config: Config, atlas: Atlas) -> OnnxNetwork:
    """Load a network and export it as ONNX with the layers of an atlas.

    Raises:
        AtlasError: If it cannot be loaded or exported.
    """
    try:
        model = load_model(config.model)
        return export_network(model, list_layers(model, config.layers, config.model.aliases), atlas)
    except AtlasError:
        raise
    except Exception as error:
        # The network may be the user's code, which can raise anything; a site without the page is still a site.
        raise AtlasError(f"{config.model.name} can't be loaded or exported: {first_line(error)}") from error
