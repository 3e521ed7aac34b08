"""Hydra's search path: the config files of this package and of the enabled plug-ins."""

from __future__ import annotations

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from maskseg.files.configs import config_folder, config_folders


class PluginFolders(SearchPathPlugin):
    """Adds the `configs/` of the enabled plug-ins to the search path of Hydra."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders, after the folder of this package."""
        for folder in config_folders()[1:]:
            search_path.append("maskseg.plugins", f"file://{folder.resolve()}")


def open_configs() -> hydra.initialize_config_dir:
    """Return a context in which Hydra composes configs of all folders. Raises UserError."""
    folder = config_folder().resolve()
    Plugins.instance().register(PluginFolders)  # does nothing the second time
    return hydra.initialize_config_dir(str(folder), version_base="1.3")
