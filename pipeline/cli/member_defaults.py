"""A source of YAML files for Hydra completing members of `conf/render/GROUP/` with the defaults of their classes."""

from pathlib import PurePosixPath
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from pipeline.config.defaults import complete_group
from pipeline.visualization.preset import KEYED_GROUPS, SINGLE_GROUPS

SCHEME = "atlas"


class MemberSource(FileConfigSource):
    """A folder of YAML files whose group members are completed.

    The keys of the composed configuration are then those of the classes: overrides need no `+`, completion and
    `atlas run --help` list all settings, and a run stores the values that it was made with.
    """

    @staticmethod
    def scheme() -> str:
        """Return the scheme of the paths that Hydra reads with this source."""
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file; complete it if it is a member of a group, and not derived from another file."""
        result = super().load_config(config_path)
        parts = PurePosixPath(config_path).parts
        is_member = len(parts) == 3 and parts[0] == "render" and parts[1] in (*SINGLE_GROUPS, *KEYED_GROUPS)
        if is_member and "defaults" not in result.config:
            settings: Any = OmegaConf.to_container(result.config, resolve=False)
            result.config = _config(complete_group(parts[1], settings))
        return result


def _config(settings: Any) -> DictConfig:
    config = OmegaConf.create(settings)
    assert isinstance(config, DictConfig)
    return config


class MemberSearchPath(SearchPathPlugin):
    """Makes Hydra read the folder `conf/` with `MemberSource`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Replace the scheme of the main folder."""
        for element in search_path.get_path():
            if element.provider == "main" and element.path is not None:
                element.path = f"{SCHEME}://{element.path.removeprefix('file://')}"


def register() -> None:
    """Register the source with Hydra; repeated calls do nothing."""
    Plugins.instance().register(MemberSource)
    Plugins.instance().register(MemberSearchPath)
