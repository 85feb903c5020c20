"""Compiled C loops for the CPU, their build, and the settings of the memory allocator."""
