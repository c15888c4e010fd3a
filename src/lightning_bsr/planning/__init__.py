"""Plans what ``fit`` would do, with the model, data, callbacks and optimizers that it would have."""

from lightning_bsr.planning._fit import FitPlanner, FitStep, plan_fit

__all__ = ["FitPlanner", "FitStep", "plan_fit"]
