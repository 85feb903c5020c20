"""Feature visualization: objectives, presets, batches, the optimization loop and the evaluation of images."""
