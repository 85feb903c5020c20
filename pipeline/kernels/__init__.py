"""Compiled CPU loops, their build, and settings of the memory allocator."""
