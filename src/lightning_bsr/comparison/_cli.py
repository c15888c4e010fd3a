"""The ``compare`` subcommand: its options and its help."""

import functools
import sys
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from lightning_bsr._cli_configuration import fit_configuration
from lightning_bsr._errors import ConfigurationError
from lightning_bsr.comparison._compare import compare, resume_hint
from lightning_bsr.comparison._configuration import configured_lr
from lightning_bsr.comparison._methods import method_names
from lightning_bsr.comparison._settings import Settings, numbers, words


class CompareCommand:
    """Has the method that LightningCLI turns into ``lightning-bsr compare``; for a Trainer class to inherit.

    Attributes:
        cli: The command line that made the Trainer; its class makes model, data and Trainer of each run too.
    """

    cli: LightningCLI

    def compare(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        methods: list[str] | str | None = None,
        lrs: dict[str, Any] | list[float] | str = "5e-4,1.5e-3,4.5e-3",
        seeds: list[int] | str = "0,1,2",
        output: str = "runs/compare",
        lr_key: str = "model.init_args.lr",
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        test_metric: str = "test/accuracy",
        equal_time: bool = True,
        max_epoch_factor: float = 4.0,
        jobs: int = 1,
        timing_steps: int = 5,
        method_options: dict[str, dict[str, Any]] | None = None,
        vit: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Compare ways of fine-tuning on the configured model and data, with the same recipe and seeds.

        Args:
            model: The configured module.
            datamodule: The configured data.
            methods: Methods to compare, separated by commas; the others are compared with the first. All by default.
            lrs: Learning rates to choose from, for each method, by the validation metric of the first seed; a mapping
                gives each method its own. "configured" is that of the configuration.
            seeds: Seeds to run with the chosen learning rate.
            output: Folder for the results. What is there already is not run again.
            lr_key: The key of the configuration that is the learning rate.
            monitor: Validation metric that chooses the learning rate.
            mode: Whether more of the metric is better (max) or less (min).
            test_metric: Test metric that the table shows.
            equal_time: Whether each method also runs for the time that the first one takes.
            max_epoch_factor: The longest run at equal time, as a multiple of trainer.max_epochs or max_steps.
            jobs: Runs at a time, each in a process of its own.
            timing_steps: Training steps to time, each time around.
            method_options: Options of methods, by name, such as {bsr: {blocks: [3, 7, 11]}}.
            vit: Dotted path of the ViT, for when the module holds several.
            ckpt_path: Must be null; here so that the configuration that fit has written can be given.
            weights_only: Ignored; here for the same reason.
        """
        if ckpt_path is not None:
            raise ConfigurationError(
                f"ckpt_path is {ckpt_path!r}, expected none: all methods start alike, from the model."
            )
        configuration = fit_configuration(self.cli)
        settings = Settings(
            methods=tuple(method_names()) if methods is None else words(methods),
            lrs=_rates(lrs, configuration, lr_key),
            seeds=numbers("seeds", seeds, int),
            output=Path(output),
            lr_key=lr_key,
            monitor=monitor,
            mode=mode,
            test_metric=test_metric,
            equal_time=equal_time,
            max_epoch_factor=max_epoch_factor,
            jobs=jobs,
            timing_steps=timing_steps,
            method_options=method_options or {},
            vit=vit,
        )
        try:
            compare(configuration, settings, functools.partial(type(self.cli), run=False))
        except KeyboardInterrupt:
            print(f"\n{resume_hint(settings)}", file=sys.stderr)
            sys.exit(130)  # as the shell has it for Ctrl-C


def _rates(
    given: dict[str, Any] | list[float] | str, configuration: dict[str, Any], lr_key: str
) -> tuple[float, ...] | dict[str, tuple[float, ...]]:
    if isinstance(given, dict):
        return {method: _some_rates(f"lrs.{method}", lrs, configuration, lr_key) for method, lrs in given.items()}
    return _some_rates("lrs", given, configuration, lr_key)


def _some_rates(name: str, given: Any, configuration: dict[str, Any], lr_key: str) -> tuple[float, ...]:
    if given == "configured":
        given = [configured_lr(configuration, lr_key)]
    return numbers(name, [given] if isinstance(given, (int, float)) else given, float)
