"""MC-Dropout of lightning-uq-box, as it is: only the list of callbacks changes."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_bsr import BlockSelect, LeanActivations, PrefixCache, TokenDrop
from plain_modules import RandomImages, state, tiny_vit

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("default"),  # its dependencies warn of many things, none of them ours
]
methods = pytest.importorskip(
    "lightning_uq_box.uq_methods", reason="needs the package lightning-uq-box", exc_type=ImportError
)


def batches():
    """Batches as lightning-uq-box wants them: dictionaries."""
    pictures, labels = RandomImages(batches=2).data.tensors
    samples = [{"input": picture, "target": label} for picture, label in zip(pictures, labels, strict=True)]
    return DataLoader(samples, batch_size=4)


def mc_dropout():
    vit = tiny_vit(depth=3, drop_rate=0.2, proj_drop_rate=0.2)
    return methods.MCDropoutClassification(vit, num_mc_samples=3, loss_fn=nn.CrossEntropyLoss())


def test_mc_dropout__trains_the_chosen_blocks_and_samples(make_trainer):
    modules = []
    for exact_levers in ([], [LeanActivations(), PrefixCache()]):
        module = mc_dropout()
        before, as_it_was = {name: t.clone() for name, t in module.model.state_dict().items()}, state(module)
        trainer = make_trainer(BlockSelect([1]), TokenDrop([1], 0.5), *exact_levers, max_epochs=2)
        torch.manual_seed(0)
        trainer.fit(module, batches(), batches())
        assert state(module) == as_it_was
        changed = {name for name, t in module.model.state_dict().items() if not torch.equal(t, before[name])}
        assert changed == {name for name in before if name.startswith(("blocks.1.", "norm.", "head."))}
        modules.append(module)
    plain, lean = (module.model.state_dict() for module in modules)
    assert all(torch.equal(lean[name], plain[name]) for name in plain)
    assert trainer.test(modules[1], batches(), verbose=False)[0].keys() >= {"testAcc"}
    sampled = modules[1].predict_step(next(iter(batches()))["input"])
    assert (sampled["pred_uct"] > 0).all()  # dropout in blocks that were frozen draws again
