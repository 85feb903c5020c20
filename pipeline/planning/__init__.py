"""What a run will do: its folder, inputs, units, tasks and estimated time."""
