"""Feature visualization: objectives, parameterizations, transforms, regularizers and the optimization loop."""
