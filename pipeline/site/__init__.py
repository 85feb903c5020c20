"""A static website from an atlas: pages for the network, its layers, units, families and method, and a map.

    import pipeline
    from pipeline.site.build import build_site
    from pipeline.site.config import SiteConfig

    with pipeline.open_atlas("runs/efficientnet_lite0-distill") as atlas:
        build_site(atlas, Path("runs/efficientnet_lite0-distill/site"), SiteConfig())

The site consists of plain files that open from disk and from any web host, and loads nothing from other hosts.
"""
