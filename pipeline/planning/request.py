"""What a command was asked to do."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from pipeline.config.schema import Config
from pipeline.planning.folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Request:
    """The configuration of a command.

    Attributes:
        config: The typed configuration.
        tree: The same as plain data.
        text: The same as YAML, which is stored in the run folder.
    """

    config: Config
    tree: Mapping[str, Any]
    text: str

    @functools.cached_property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.config.folder, self.config.url)
