"""Beside the callback FinetuningScheduler of the package finetuning-scheduler."""

import pytest
import torch

from lightning_bsr import BlockSelect, ConfigurationError, LeanActivations, QuantizeFrozen, TokenDrop
from plain_modules import PlainModule

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("default"),  # it warns of many things, none of them ours
]
finetuning_scheduler = pytest.importorskip(
    "finetuning_scheduler", reason="needs the package finetuning-scheduler", exc_type=ImportError
)


@pytest.mark.parametrize("ours", [lambda: BlockSelect([1]), QuantizeFrozen], ids=["select", "quantize"])
def test_finetuning_scheduler__is_refused_beside(ours, make_trainer, images):
    callback = ours()
    with pytest.raises(ConfigurationError) as error:
        make_trainer(callback, finetuning_scheduler.FinetuningScheduler(), enable_checkpointing=True).fit(
            PlainModule(depth=2), images
        )
    assert str(error.value) == (
        "FinetuningScheduler freezes the ViT 'model' (VisionTransformer) and unfreezes it later on, which "
        f"{type(callback).__name__} cannot go together with; leave one of the two callbacks out."
    )


def test_finetuning_scheduler__trains_with_dropped_tokens(make_trainer, images):
    module = PlainModule(depth=2)
    before = module.model.head.weight.clone()
    scheduler = finetuning_scheduler.FinetuningScheduler(max_depth=0)
    make_trainer(TokenDrop([0], 0.5), LeanActivations(), scheduler, enable_checkpointing=True, max_epochs=1).fit(
        module, images
    )
    assert not torch.equal(module.model.head.weight, before)
    assert not any("forward" in vars(block) for block in module.model.blocks)
