"""Lightning checkpoints without the frozen base, which is checked and put back when they are loaded."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_bsr.functional._delta import merge, what_it_computes
from lightning_bsr.functional._delta_file import Delta

_KEY = "lightning_bsr_delta"


def leave_out_base(pl_module: LightningModule, base: Mapping[str, str], checkpoint: dict[str, Any]) -> None:
    """Take the frozen base out of a checkpoint and put its fingerprints in.

    Args:
        pl_module: The module that is saved.
        base: The fingerprint of each frozen parameter.
        checkpoint: As Lightning gives it to ``on_save_checkpoint``.
    """
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: state[name] for name in state if name not in base}
    checkpoint[_KEY] = {"base": dict(base), "configuration": what_it_computes(pl_module)}


class CompletesCheckpoints:
    """Stands before a module's ``on_load_checkpoint``: what comes after, strict loading too, sees a whole checkpoint.

    A callback's own hook would be too late, as the weights are loaded before it.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._module = pl_module
        self._replaced: Callable[[dict[str, Any]], None] | None = vars(pl_module).get("on_load_checkpoint")
        self._own = pl_module.on_load_checkpoint
        pl_module.on_load_checkpoint = self  # type: ignore[method-assign]  # on this instance only

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Put the module's own frozen parameters into ``checkpoint`` where they were left out.

        Raises:
            ConfigurationError: If they are not those that the checkpoint was trained with. Nothing has changed then.
        """
        left_out = checkpoint.pop(_KEY, None)
        if left_out is not None:
            # What is going to be done anyway, a little later.
            self._module.trainer.precision_plugin.convert_module(self._module)
            state = checkpoint["state_dict"]
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            delta = Delta(tensors, left_out["base"], left_out["configuration"])
            checkpoint["state_dict"] = {**merge(self._module.state_dict(), delta, "the checkpoint"), **state}
        self._own(checkpoint)

    def remove(self) -> None:
        """Give the module its own ``on_load_checkpoint`` again."""
        del self._module.on_load_checkpoint
        if self._replaced is not None:
            self._module.on_load_checkpoint = self._replaced  # type: ignore[method-assign, assignment]  # its own
