"""Typed configuration from plain data."""
