"""The dataset pass: exact statistics of each channel, and dataset examples."""
