"""LightningModules as users write them: they know nothing of lightning-bsr."""

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def tiny_vit(**kwargs) -> nn.Module:
    """A ViT of 6 blocks for 32 px images, with weights that a forward pass can tell apart."""
    arguments = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 4,
    }
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(**{**arguments, **kwargs})


def state(module):
    """What a callback must leave as it was: flags, modes, hooks and what is set on instances."""
    return {
        "flags": [p.requires_grad for p in module.parameters()],
        "attributes": {name: sorted(vars(m)) for name, m in module.model.named_modules()},
        "modes": [m.training for m in module.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
        "own": {"configure_model", "on_load_checkpoint"} & vars(module).keys(),
    }


class PlainModule(LightningModule):
    def __init__(self, **kwargs):
        super().__init__()
        self.model = tiny_vit(**kwargs)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.model(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class BuildsInConfigureModel(PlainModule):
    def __init__(self):
        LightningModule.__init__(self)
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = tiny_vit()


class BuildsInSetup(PlainModule):
    def __init__(self):
        LightningModule.__init__(self)

    def setup(self, stage):
        if not hasattr(self, "model"):
            self.model = tiny_vit()


class ManualOptimization(PlainModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class TwoBackwards(ManualOptimization):
    """Two passes in each batch, of so many images."""

    counts = (4, 1)

    def training_step(self, batch, batch_idx):
        for count in self.counts:
            self.manual_backward(F.cross_entropy(self.model(batch[0][:count]), batch[1][:count]))
        self.optimizers().step()
        self.optimizers().zero_grad()


class ResumableLoader(DataLoader):
    """Goes on where it was in the middle of an epoch, by the state that Lightning keeps for it."""

    given, skip = 0, 0

    def __iter__(self):
        skip, self.skip, self.given = self.skip, 0, 0
        for batch in super().__iter__():
            self.given += 1
            if self.given > skip:
                yield batch

    def state_dict(self):
        return {"given": self.given % len(self)}

    def load_state_dict(self, state):
        self.skip = state["given"]


class RandomImages(LightningDataModule):
    def __init__(self, batches: int = 4, batch_size: int = 4, loader_class: type[DataLoader] = DataLoader):
        super().__init__()
        self.loader_class = loader_class
        generator = torch.Generator().manual_seed(1)
        count = batches * batch_size
        self.data = TensorDataset(
            torch.randn(count, 3, 32, 32, generator=generator),
            torch.randint(4, (count,), generator=generator),
        )
        self.batch_size = batch_size

    def loader(self):
        return self.loader_class(self.data, batch_size=self.batch_size)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader
