"""Feature visualization: objectives, parameterizations, transforms, regularizers and the optimisation loop."""
