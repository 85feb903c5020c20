"""Names of units: by people, from labels of the dataset, and by a CLIP model of the user's."""
