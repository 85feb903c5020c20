"""Transfer to other networks: what a network that was not optimized finds in feature visualizations."""
