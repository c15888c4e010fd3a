"""The command line: LightningCLI with this package's models, data and callbacks, and errors in one line."""

import sys
import warnings
from pathlib import Path

from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import lightning_bsr
from lightning_bsr._cli_errors import one_line
from lightning_bsr._errors import ConfigurationError

_WARNINGS_TO_HIDE = (
    "LightningCLI's args parameter is intended to run from within Python",  # as main's is
    "Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is meant
    "The '.*' does not have many workers",  # the data modules choose their workers
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # between lightning 2.6 and torch, not the user's to mend
)
_CHECKPOINT_NAMES = ("last", "hpc")  # not "best": no process knows another's


class BSRCLI(LightningCLI):
    """LightningCLI whose model learns the number of classes from the data, and which can test after ``fit``.

    Everything of ``lightning_bsr`` and Lightning is known by its short class name. Errors are raised:
    ``ArgumentError`` and ``ConfigurationError`` are the user's, see :func:`main`.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "lightning-bsr", "version": lightning_bsr.__version__, "exit_on_error": False},
            args=args,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": "ViTClassifier", "data": "DigitsDataModule"})
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Whether fit ends with a test of the trained model."
        )

    @override
    def before_instantiate_classes(self) -> None:
        path = self._get(self.config, "ckpt_path")
        if path and path not in _CHECKPOINT_NAMES and "://" not in path and not Path(path).exists():
            raise ConfigurationError(
                f"ckpt_path is {path!r}, but there is no such file; expected a checkpoint file or one of "
                f"{', '.join(map(repr, _CHECKPOINT_NAMES))}."
            )

    def after_fit(self) -> None:
        """Test the trained model, if asked to."""
        if self._get(self.config, "test_after_fit"):
            self.trainer.test(self.model, datamodule=self.datamodule)


def main(args: list[str] | None = None) -> None:
    """Run the command line; what the user got wrong ends in one line and exit code 2.

    Args:
        args: The arguments; those of the process by default.

    Example:
        >>> main(["fit", "--trainer.max_epochs=many"])
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    for message in _WARNINGS_TO_HIDE:
        warnings.filterwarnings("ignore", message)
    try:
        BSRCLI(args)
    except (ArgumentError, ValueError) as error:
        # jsonargparse turns what a class's constructor raises into an error of its own.
        mistake = next(
            (e for e in (error, error.__cause__) if isinstance(e, (ArgumentError, ConfigurationError))), None
        )
        if mistake is None:
            raise
        print(f"lightning-bsr: error: {one_line(str(mistake))}", file=sys.stderr)
        sys.exit(2)
