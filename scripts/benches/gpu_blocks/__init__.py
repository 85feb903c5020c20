"""The parts of `scripts/benches/gpu.py`: one module for each block of measurements."""
