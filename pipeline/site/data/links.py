"""Addresses within a site, and the citation of an atlas."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from pipeline.site.config import SiteConfig
from pipeline.site.hosting.hosts import yaml_text

HOME_CARD = "cards/home.jpg"
# Characters with a meaning in TeX.
TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {character: f"\\{character}" for character in "{}$&#_%"}


def absolute(url: str | None, path: str) -> str:
    """Return the address of the file `path` of a site at `url`; the relative address if the site has none."""
    relative = quote(path, safe="/~.-_")
    return relative if url is None else f"{url.rstrip('/')}/{relative}"


def citation(attributes: Mapping[str, Any], config: SiteConfig) -> str:
    """Return the content of CITATION.cff, which GitHub and reference managers read."""
    lines = [
        "cff-version: 1.2.0",
        "message: To cite a unit, name it layer:channel and give the digest of its preset.",
        "type: dataset",
        f"title: {yaml_text(atlas_title(attributes, config))}",
        "authors:",
        f"  - name: {yaml_text(config.author or config.title)}",
        f"version: {yaml_text(_identity(attributes) or '1')}",
    ]
    if config.url:
        lines.append(f"url: {yaml_text(config.url)}")
    if attributes.get("created"):
        lines.append(f"date-released: {str(attributes['created'])[:10]}")
    lines += [
        "references:",
        "  - type: article",
        "    title: Feature Visualization",
        "    doi: 10.23915/distill.00007",
        "    year: 2017",
        "    journal: Distill",
        "    authors:",
        "      - {family-names: Olah, given-names: Chris}",
        "      - {family-names: Mordvintsev, given-names: Alexander}",
        "      - {family-names: Schubert, given-names: Ludwig}",
    ]
    return "\n".join(lines) + "\n"


def bibtex(attributes: Mapping[str, Any], config: SiteConfig) -> str:
    """Return a BibTeX entry of the atlas; fields that the settings do not give are left out."""
    model, year = str(attributes.get("model", "")), str(attributes.get("created", ""))[:4]
    key = re.sub(r"[^a-z0-9]", "", f"{config.title}{year}{model}".lower()) or "atlas"
    identity = _identity(attributes)
    fields = {
        "title": "{" + _tex(atlas_title(attributes, config)) + "}",
        "author": _tex(config.author or ""),
        "year": year,
        "howpublished": f"\\url{{{config.url}}}" if config.url else "",
        "note": f"Atlas {_tex(identity)}" if identity else "",
    }
    return "\n".join([f"@misc{{{key},", *(f"  {k} = {{{v}}}," for k, v in fields.items() if v), "}"])


def atlas_title(attributes: Mapping[str, Any], config: SiteConfig) -> str:
    """Return the title of an atlas: that of the site, and the network."""
    return f"{config.title}: {attributes.get('model', 'a vision network')}"


def _identity(attributes: Mapping[str, Any]) -> str:
    return str(attributes.get("identity", ""))[:12]


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in text)
