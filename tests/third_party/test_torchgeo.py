"""torchgeo's ClassificationTask, as it is: only the list of callbacks changes."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, LeanActivations, PrefixCache, QuantizeFrozen, TokenDrop

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("default"),  # its dependencies warn of many things, none of them ours
]
trainers = pytest.importorskip("torchgeo.trainers", reason="needs the package torchgeo", exc_type=ImportError)


class Scenes(Dataset):
    """Samples as torchgeo's data sets give them: dictionaries, here of four bands."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.rand(4, 160, 160, generator=generator), "label": torch.tensor(index % 3)}


def test_classification_task__trains_the_chosen_blocks(make_trainer):
    task = trainers.ClassificationTask("test_vit", in_channels=4, num_classes=3, lr=0.01)
    before, flags = copy.deepcopy(task.state_dict()), [p.requires_grad for p in task.parameters()]
    monitor = ActivationMemoryMonitor()
    trainer = make_trainer(
        BlockSelect([3, 5]),
        TokenDrop([1, 3], 0.5),
        LeanActivations(),
        PrefixCache(),
        QuantizeFrozen(),
        monitor,
        max_epochs=2,
    )
    loader = DataLoader(Scenes(), batch_size=4)
    trainer.fit(task, loader, loader)
    changed = {
        n.split(".")[2] for n, t in task.state_dict().items() if ".blocks." in n and not torch.equal(t, before[n])
    }
    assert {"3", "5"} <= changed
    norms = {
        n.split(".")[2] for n in before if ".norm1.weight" in n and not torch.equal(task.state_dict()[n], before[n])
    }
    assert norms == {"3", "5"}  # of the others only the weights of linear layers are rounded
    assert [p.requires_grad for p in task.parameters()] == flags
    assert [line.tokens for line in monitor.report.by_block][2:5] == [52, 52, 28]
    assert trainer.callback_metrics["prefix_cache/hit_rate"] == 1
    assert "val_loss" in trainer.callback_metrics
    assert trainer.test(task, loader, verbose=False)[0].keys() >= {"test_loss"}
