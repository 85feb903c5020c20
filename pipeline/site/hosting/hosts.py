"""Where a site can be put: what each host takes, and what it needs beside the pages."""

import dataclasses
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import AtlasError, nearest
from pipeline.site.output import ours, write

MB = 1_000_000


@dataclasses.dataclass(frozen=True)
class Host:
    """Limits as the host documents them (2026), 0 for none; `largest` is for one file, `folder` entries of one folder.

    `command` is what is left to type, with {site} for the folder.
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
        "cd {site} && git init -q -b gh-pages && git add -A && git commit -qm Atlas "
        "&& git push -f git@github.com:USER/REPOSITORY.git gh-pages",
    ),
    Host(
        "gitlab", "GitLab Pages", 1000 * MB, 200_000, 0, 0,
        "cd {site} && git init -q -b pages && git add -A && git commit -qm Atlas "
        "&& git push -f git@gitlab.com:USER/REPOSITORY.git pages",
    ),
    Host(
        "cloudflare", "Cloudflare Pages", 0, 20_000, 25 * 2**20, 0,
        "npx wrangler pages deploy {site} --project-name NAME",
    ),
    Host(
        "huggingface", "Hugging Face", 1000 * MB, 100_000, 0, 10_000,
        "hf upload USER/NAME {site} . --repo-type space",
    ),
    Host("bucket", "a plain bucket", 0, 0, 0, 0, "aws s3 sync {site} s3://BUCKET/PATH --delete"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """What a site weighs: files, bytes, the largest folder with its (files, bytes), the largest file, most entries."""

    files: int
    bytes: int
    largest_folder: str
    folder_files: int
    folder_bytes: int
    largest_file: int
    most_entries: int

    def why_not(self, host: Host) -> str:
        """Why `host` would not take it, or nothing."""
        for have, most, what in (
            (self.bytes, host.bytes, "bytes"),
            (self.files, host.files, "files"),
            (self.largest_file, host.largest, "bytes in one file"),
            (self.most_entries, host.folder, "entries in one folder"),
        ):
            if most and have > most:
                return f"{have:,} {what}, {most:,} at most"
        return ""

    def lines(self) -> list[str]:
        """The report for people."""
        found = [
            f"{self.files:,} files, {self.bytes / MB:,.1f} MB; most in {self.largest_folder}: "
            f"{self.folder_files:,} files, {self.folder_bytes / MB:,.1f} MB"
        ]
        for host in HOSTS:
            reason = self.why_not(host)
            found.append(f"  {host.name:<17} {f'no: {reason}' if reason else 'yes'}")
        return found


def weighed(folder: Path) -> Report:
    """Weigh a finished site."""
    files, size, largest, most = 0, 0, 0, 0
    tops: dict[str, tuple[int, int]] = {}
    waiting = [(os.fspath(folder), "./")]
    while waiting:
        where, top = waiting.pop()
        sizes: list[int] = []
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, f"{entry.name}/" if top == "./" else top))
                else:
                    sizes.append(entry.stat().st_size)
        files, size = files + len(sizes), size + sum(sizes)
        largest, most = max([largest, *sizes]), max(most, len(sizes))
        count, total = tops.get(top, (0, 0))
        tops[top] = (count + len(sizes), total + sum(sizes))
    name, (count, total) = max(tops.items(), key=lambda item: item[1][1], default=("./", (0, 0)))
    return Report(files, size, name, count, total, largest, most)


# Pages forbid all but their own in a <meta>, too; as a header it also holds for what is no page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'"
)
HEADERS = f"""/*
  Content-Security-Policy: {POLICY}; frame-ancestors 'self'
  X-Content-Type-Options: nosniff
  Referrer-Policy: no-referrer
/media/*
  Cache-Control: public, max-age=31536000
/photos/*
  Cache-Control: public, max-age=31536000
"""


def prepare(folder: Path, target: str, title: str) -> tuple[Report, str]:
    """Make a finished site ready for `target`; returns what it weighs and the one command left to run.

    Raises `AtlasError` for an unknown target, a folder without a site, or a site that the host would refuse.
    """
    host = next((h for h in HOSTS if h.key == target), None)
    if host is None:
        raise AtlasError(f"There is no host {target!r} to publish on. {nearest(target, [h.key for h in HOSTS])}")
    if not ours(folder):
        raise AtlasError(f"{folder} holds no site: `atlas site` writes one.")
    extras: dict[str, Callable[[], str]] = {
        "gitlab": lambda: (
            "pages:\n  script: ['true']\n  publish: .\n  rules: [{if: $CI_COMMIT_BRANCH == 'pages'}]\n"
            "  artifacts: {paths: [.]}\n"
        ),
        "huggingface": lambda: (
            f"---\ntitle: {yaml_text(title)}\nsdk: static\napp_file: index.html\npinned: false\n---\n"
        ),
    }
    if target in extras:
        write(folder, {"gitlab": ".gitlab-ci.yml", "huggingface": "README.md"}[target], extras[target]())
    report = weighed(folder)
    reason = report.why_not(host)
    if reason:
        raise AtlasError(
            f"{host.name} would not take this site: {reason}. Build it smaller: `atlas site site.max_bytes=… "
            "site.max_files=…`."
        )
    return report, host.command.format(site=shlex.quote(str(folder)))


def yaml_text(text: str) -> str:
    """A YAML string in double quotes, whatever is in it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else " " for c in escaped) + '"'
