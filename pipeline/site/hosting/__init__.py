"""Serve a site from this machine, or publish it on a host of static files."""
