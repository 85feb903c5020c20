"""The page `own-image.html`: the network as ONNX, run in the browser on an image of the reader."""
