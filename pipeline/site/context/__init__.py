"""The data that the templates of the pages receive."""
