"""Load a network from torchvision, timm, a checkpoint, an exported program or the user's own code."""
