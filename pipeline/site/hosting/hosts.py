"""Web hosts that a site can be published on: their limits and the files that they need."""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import AtlasError, nearest_names
from pipeline.site.output import ours, write

MB = 1_000_000


@dataclasses.dataclass(frozen=True)
class Host:
    """A web host with its documented limits (2026); 0 means no limit.

    Attributes:
        key: Name on the command line.
        name: Name in reports.
        bytes: Largest size of a site in bytes.
        files: Largest number of files.
        largest: Largest size of one file in bytes.
        folder: Largest number of entries in one folder.
        command: Command that publishes the folder {site}.
    """

    key: str
    name: str
    bytes: int
    files: int
    largest: int
    folder: int
    command: str


HOSTS = (
    Host(
        "github", "GitHub Pages", 1000 * MB, 0, 100 * MB, 0,
        "cd {site} && git init -q -b gh-pages && git add -A && git commit -q --allow-empty -m Atlas "
        "&& git push -f git@github.com:USER/REPOSITORY.git gh-pages",
    ),
    Host(
        "gitlab", "GitLab Pages", 1000 * MB, 200_000, 0, 0,
        "cd {site} && git init -q -b pages && git add -A && git commit -q --allow-empty -m Atlas "
        "&& git push -f git@gitlab.com:USER/REPOSITORY.git pages",
    ),
    Host(
        "cloudflare", "Cloudflare Pages", 0, 20_000, 25 * 2**20, 0,
        "npx wrangler pages deploy {site} --project-name NAME",
    ),
    Host(
        "huggingface", "Hugging Face", 1000 * MB, 100_000, 0, 10_000,
        "hf upload USER/NAME {site} . --repo-type space --exclude '.git/*'",
    ),
    Host(
        "bucket", "a plain bucket", 0, 0, 0, 0,
        "aws s3 sync {site} s3://BUCKET/PATH --delete --exclude '.*'",
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """Size of a site.

    Attributes:
        files: Number of files.
        bytes: Total size in bytes.
        largest_folder: Top-level folder with the largest size.
        folder_files: Number of files in that folder.
        folder_bytes: Size of that folder in bytes.
        largest_file: Size of the largest file in bytes.
        most_entries: Largest number of files directly in one folder.
    """

    files: int
    bytes: int
    largest_folder: str
    folder_files: int
    folder_bytes: int
    largest_file: int
    most_entries: int

    def why_not(self, host: Host) -> str:
        """Return the limit of `host` that the site exceeds, or an empty string."""
        for value, limit, what in (
            (self.bytes, host.bytes, "bytes"),
            (self.files, host.files, "files"),
            (self.largest_file, host.largest, "bytes in one file"),
            (self.most_entries, host.folder, "entries in one folder"),
        ):
            if limit and value > limit:
                return f"{value:,} {what}, {limit:,} at most"
        return ""

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [
            f"{self.files:,} files, {self.bytes / MB:,.1f} MB; largest folder {self.largest_folder}: "
            f"{self.folder_files:,} files, {self.folder_bytes / MB:,.1f} MB"
        ]
        for host in HOSTS:
            reason = self.why_not(host)
            lines.append(f"  {host.name:<17} {f'no: {reason}' if reason else 'yes'}")
        return lines


def weighed(folder: Path) -> Report:
    """Measure the size of a finished site."""
    files, total_bytes, largest_file, most_entries = 0, 0, 0, 0
    # (files, bytes) by top-level folder.
    top_folders: dict[str, tuple[int, int]] = {}
    pending = [(os.fspath(folder), "./")]
    while pending:
        path, top = pending.pop()
        sizes: list[int] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, f"{entry.name}/" if top == "./" else top))
                else:
                    sizes.append(entry.stat().st_size)
        files += len(sizes)
        total_bytes += sum(sizes)
        largest_file = max([largest_file, *sizes])
        most_entries = max(most_entries, len(sizes))
        top_files, top_bytes = top_folders.get(top, (0, 0))
        top_folders[top] = (top_files + len(sizes), top_bytes + sum(sizes))
    name, (top_files, top_bytes) = max(top_folders.items(), key=lambda item: item[1][1], default=("./", (0, 0)))
    return Report(files, total_bytes, name, top_files, top_bytes, largest_file, most_entries)


# Pages repeat this policy in a <meta> element; the header also covers files that are not pages.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'"
)
# The page that runs the network compiles WebAssembly. It can send nothing: there is no connect-src.
OWN_IMAGE_POLICY = POLICY.replace("script-src 'self'", "script-src 'self' 'wasm-unsafe-eval'")
HEADERS = f"""/*
  Content-Security-Policy: {POLICY}; frame-ancestors 'self'
  X-Content-Type-Options: nosniff
  Referrer-Policy: no-referrer
/embed.html
  ! Content-Security-Policy
  Content-Security-Policy: {POLICY}; frame-ancestors *
/own-image.html
  ! Content-Security-Policy
  Content-Security-Policy: {OWN_IMAGE_POLICY}; frame-ancestors 'self'
/media/*
  Cache-Control: public, max-age=31536000
/photos/*
  Cache-Control: public, max-age=31536000
"""


# Files that hosts need beside the site.
EXTRA_FILES = {"gitlab": ".gitlab-ci.yml", "huggingface": "README.md"}


def prepare_for_host(folder: Path, target: str, title: str) -> tuple[Report, str]:
    """Prepare a finished site for a web host.

    Args:
        folder: Folder of the site.
        target: Key of the host.
        title: Title of the site.

    Returns:
        The size of the site, and the command that publishes it.

    Raises:
        AtlasError: If the host is unknown, the folder is not a site, or the site exceeds a limit of the host.
    """
    host = next((h for h in HOSTS if h.key == target), None)
    if host is None:
        raise AtlasError(f"Unknown host {target!r}. {nearest_names(target, [h.key for h in HOSTS])}")
    if not ours(folder):
        raise AtlasError(f"{folder} contains no site. Build it with `atlas site`.")
    extras: dict[str, Callable[[], str]] = {
        "gitlab": lambda: (
            "pages:\n  script: ['true']\n  publish: .\n  rules: [{if: $CI_COMMIT_BRANCH == 'pages'}]\n"
            "  artifacts: {paths: [.]}\n"
        ),
        "huggingface": lambda: (
            f"---\ntitle: {yaml_text(title)}\nsdk: static\napp_file: index.html\npinned: false\n---\n"
        ),
    }
    for key, name in EXTRA_FILES.items():
        if key == target:
            write(folder, name, extras[key]())
        else:  # a file for another host would be published, too
            (folder / name).unlink(missing_ok=True)
    report = weighed(folder)
    reason = report.why_not(host)
    if reason:
        raise AtlasError(
            f"{host.name} does not accept this site: {reason}. Build a smaller one with `atlas site site.max_bytes=… "
            "site.max_files=…`."
        )
    return report, host.command.format(site=shlex.quote(str(folder)))


def missing_addresses(folder: Path, atlas: Path) -> list[str]:
    """Return what the site in `folder` lacks for readers elsewhere, with the setting that adds it, as lines of text.

    Args:
        folder: Folder of a finished site.
        atlas: The file of the atlas.
    """
    index = json.loads((folder / "api/v1/index.json").read_text(encoding="utf-8"))
    lines = []
    if not index.get("atlas") and not (folder / atlas.name).exists():
        lines.append(
            f"{atlas.name} ({atlas.stat().st_size / MB:,.0f} MB) is not a part of the site, and no page links to "
            "it. Put it on a host of data (GitHub releases, Zenodo, Hugging Face datasets) and build the site "
            "with site.atlas_url=ADDRESS; or include it, if it is small, with site.copy_atlas=true."
        )
    if not index.get("url"):
        lines.append(
            "The address of the site is not known: previews of shared links will lack their image, and there is no "
            "sitemap.xml. Build the site with site.url=ADDRESS."
        )
    return ["", *lines] if lines else []


def yaml_text(text: str) -> str:
    """Return `text` as a YAML string in double quotes; unprintable characters become spaces."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else " " for c in escaped) + '"'
