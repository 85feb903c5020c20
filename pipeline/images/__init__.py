"""Images and what is done to them, independent of a network: parameterizations, transforms, regularizers, metrics."""
