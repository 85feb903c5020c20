"""Images of a site: their sizes, their files and their encoding."""
