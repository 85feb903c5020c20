"""Images of a site: which, how large, and in which files."""
