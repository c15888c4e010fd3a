"""What a subcommand of this package takes from the configuration that ``fit`` takes too."""

from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI


def fit_configuration(cli: LightningCLI) -> dict[str, Any]:
    """Return a subcommand's configuration without the options of the subcommand itself.

    Args:
        cli: A command line that has parsed its arguments.
    """
    name = str(cli.subcommand)
    dumped: dict[str, Any] = yaml.safe_load(cli._subcommand_parsers[name].dump(cli.config[name], skip_none=False))
    own = {"config", *cli._subcommand_method_arguments[name]}
    return {key: value for key, value in dumped.items() if key not in own}
