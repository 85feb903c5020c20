"""Execute tasks, in this process or on Ray."""
