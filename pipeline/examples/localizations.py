"""Arrays of the second pass by name. Readers of an atlas need no more than this of a pass, and no PyTorch."""

from collections.abc import Iterator, Mapping

import numpy as np


class Localizations(Mapping[str, np.ndarray]):
    """Arrays of the second pass by name."""

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yield an array in parts that can be in memory one at a time."""
        yield self[name]
