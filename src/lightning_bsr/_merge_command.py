"""The ``merge`` subcommand: full weights of a base and of what was trained from it."""

from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional import merge_delta
from lightning_bsr.functional._delta_file import write_tensors
from lightning_bsr.models._checkpoint import read_state_dict


class MergeCommand(Trainer):
    """A Trainer with the method that LightningCLI turns into ``lightning-bsr merge``."""

    def merge(
        self,
        model: LightningModule,
        delta: str,
        output: str,
        datamodule: LightningDataModule | None = None,
        base: str | None = None,
        overwrite: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Make full weights of a delta file and of the weights that it was trained from.

        Args:
            model: The configured module, with the weights that training started from.
            delta: The file that DeltaCheckpoint wrote.
            output: File for the full weights, .safetensors.
            datamodule: The configured data, which may say how many classes there are.
            base: File with the weights that training started from, instead of the configured model.
            overwrite: Whether the output may be replaced.
            ckpt_path: Is accepted, as fit has it, and not used.
            weights_only: Is accepted, as fit has it, and not used.
        """
        path = Path(output)
        if path.suffix != ".safetensors":
            raise ConfigurationError(f"output is {output!r}, expected a file name that ends in .safetensors.")
        if path.exists() and not overwrite:
            raise ConfigurationError(
                f"output is {output!r}, which exists already; with --overwrite true it is replaced."
            )
        if base is None:
            model.configure_model()
            self.precision_plugin.convert_module(model)
            merged = merge_delta(model, delta)
        else:
            merged = merge_delta(read_state_dict(Path(base), "base"), delta)
        write_tensors(path, merged, {"format": "pt"})
        print(f"Written: {output}, {len(merged)} tensors of {sum(t.numel() for t in merged.values()):,} values.")
