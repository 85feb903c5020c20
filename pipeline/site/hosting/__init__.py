"""Serve a site locally, or publish it on a web host for static files."""
