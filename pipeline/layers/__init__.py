"""Find the layers of a network, describe their axes and receptive fields, and choose among them."""
