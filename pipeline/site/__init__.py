"""A static web site from an atlas: pages for the network, its layers, units, families and method, and a map.

    import pipeline
    from pipeline.site import SiteConfig, build_site
    with pipeline.open_atlas("runs/efficientnet_lite0-distill") as atlas:
        build_site(atlas, Path("runs/efficientnet_lite0-distill/site"), SiteConfig())

The site is plain files that open from disk as well as from any web host. It asks nothing of other hosts.
"""

from pipeline.site.build import SiteReport as SiteReport
from pipeline.site.build import build_site as build_site
from pipeline.site.config import SiteConfig as SiteConfig
