"""List datasets, read images, and crop them."""
