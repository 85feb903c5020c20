"""Fast variants of a network, each verified against the network itself."""
