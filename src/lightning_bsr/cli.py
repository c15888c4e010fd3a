"""The command line: LightningCLI with this package's models, data and callbacks, and errors in one line."""

import contextlib
import inspect
import sys
import warnings
from typing import Any

from jsonargparse import ArgumentError, dict_to_namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import lightning_bsr
from lightning_bsr._cli_checkpoint import FinishedRun, check_ckpt_path, names_model
from lightning_bsr._cli_errors import one_line
from lightning_bsr._cli_saved import SaveConfig
from lightning_bsr._errors import ConfigurationError
from lightning_bsr._subcommands import SUBCOMMANDS, TRAINS_NOTHING, CommandTrainer, instantiating, without_infos
from lightning_bsr.callbacks._conflicts import callbacks_of

_WARNINGS_TO_HIDE = (
    "LightningCLI's args parameter is intended to run from within Python",  # as main's is
    "Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is meant
    "The '.*' does not have many workers",  # the data modules choose their workers
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # between lightning 2.6 and torch, not the user's to mend
)
_NOTHING_GIVEN = (
    "fit was given nothing, expected a configuration, such as --config examples/quickstart.yaml, or options, such as "
    "--trainer.max_epochs=3 for full fine-tuning of the bundled micro ViT on digits; 'lightning-bsr fit --help' lists "
    "them."
)


class BSRCLI(LightningCLI):
    """LightningCLI whose model learns the number of classes from the data, and which can test after ``fit``.

    Everything of ``lightning_bsr`` and Lightning is known by its short class name. Errors are raised:
    ``ArgumentError`` and ``ConfigurationError`` are the user's, see :func:`main`.

    Args:
        args: The arguments, those of the process by default; or a configuration.
        run: Whether to run the subcommand that ``args`` begin with. Otherwise there is none, and model, data and
            Trainer are only made, for a subcommand that needs several.
    """

    def __init__(self, args: list[str] | dict[str, Any] | None = None, *, run: bool = True) -> None:
        with contextlib.ExitStack() as self._contexts:
            super().__init__(
                LightningModule,
                LightningDataModule,
                trainer_class=CommandTrainer,
                save_config_callback=SaveConfig if run else None,
                run=run,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={
                    "prog": "lightning-bsr",
                    "description": "Fine-tunes vision transformers with little memory.",
                    "version": lightning_bsr.__version__,
                    "exit_on_error": False,
                },
                args=args,
            )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": "ViTClassifier", "data": "DigitsDataModule"})
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Whether fit ends with a test of the trained model."
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | SUBCOMMANDS

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            # Here it is still known which options there are.
            if 'expected "subcommand"' in str(error):
                raise ConfigurationError(_overview()) from error
            parsers: dict[str, LightningArgumentParser] = getattr(self, "_subcommand_parsers", {})
            given = sys.argv[1:] if args is None else args
            command = next((one for one in given if one in parsers), "lightning-bsr")
            options = {*parsers.get(command, parser).get_defaults(skip_validation=True).keys()} - {"subcommand"}
            raise ConfigurationError(one_line(str(error), command, options)) from error
        subcommand = self.config.get("subcommand")
        self._ckpt_path: str | None = self.config[subcommand].get("ckpt_path") if subcommand else None
        if subcommand in TRAINS_NOTHING:
            self._contexts.enter_context(without_infos())
        if self._ckpt_path:
            check_ckpt_path(self._ckpt_path, subcommand)

    @override
    def _parse_ckpt_path(self) -> None:
        # LightningCLI would make a configuration of hyperparameters of any class.
        if self._ckpt_path and names_model(self._ckpt_path):
            super()._parse_ckpt_path()

    @override
    def before_instantiate_classes(self) -> None:
        if self.subcommand in LightningCLI.subcommands():
            self._log_to_csv_by_default()

    def _log_to_csv_by_default(self) -> None:
        # Lightning's own default is TensorBoard where that happens to be installed.
        trainer = self.config[str(self.subcommand)]["trainer"]
        if trainer["logger"] in (None, True) and not trainer["barebones"]:
            folder = trainer["default_root_dir"] or "."
            logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder)}}
            trainer["logger"] = dict_to_namespace(logger)

    @override
    def instantiate_classes(self) -> None:
        with instantiating(self):
            super().instantiate_classes()

    @override
    def after_instantiate_classes(self) -> None:
        if self.subcommand in SUBCOMMANDS and isinstance(self.trainer, CommandTrainer):
            self.trainer.cli = self

    def before_fit(self) -> None:
        """Have it said if a checkpoint leaves nothing to train."""
        if self._ckpt_path:
            callbacks_of(self.trainer).append(FinishedRun())

    def after_fit(self) -> None:
        """Test the trained model, if asked to."""
        if self._get(self.config, "test_after_fit"):
            self.trainer.test(self.model, datamodule=self.datamodule)


def _overview() -> str:
    lines = ["no subcommand is given, expected one of:"]
    for name in BSRCLI.subcommands():
        sentence = (inspect.getdoc(getattr(CommandTrainer, name)) or "").partition(".")[0]
        lines.append(f"  {name:10} {' '.join(sentence.split())}.")
    return "\n".join([*lines, "With --help after it, each lists its options."])


def with_underscores(args: list[str]) -> list[str]:
    """Write underscores for the hyphens inside the names of options; values stay as they are.

    Args:
        args: The arguments.

    Example:
        >>> with_underscores(["compare", "--max-epoch-factor=2", "--output", "my-runs"])
        ['compare', '--max_epoch_factor=2', '--output', 'my-runs']
    """
    return [
        "--" + name.replace("-", "_") + equals + value if argument.startswith("--") else argument
        for argument in args
        for name, equals, value in [argument[2:].partition("=")]
    ]


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
    args = with_underscores(sys.argv[1:] if args is None else args)
    for message in _WARNINGS_TO_HIDE:
        warnings.filterwarnings("ignore", message)
    try:
        if args == ["fit"]:
            raise ConfigurationError(_NOTHING_GIVEN)
        BSRCLI(args)
    except (ArgumentError, ValueError) as error:
        # jsonargparse turns what a class's constructor raises into an error of its own.
        mistake = next(
            (e for e in (error, error.__cause__) if isinstance(e, (ArgumentError, ConfigurationError))), None
        )
        if mistake is None:
            raise
        # What this package says in several lines is a list.
        said = str(mistake) if isinstance(mistake, ConfigurationError) else one_line(str(mistake))
        print(f"lightning-bsr: error: {said}", file=sys.stderr)
        sys.exit(2)
