"""What units do: the change of the network's outputs when a unit is removed."""
