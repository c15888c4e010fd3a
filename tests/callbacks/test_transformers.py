"""The callbacks on LightningModules around models of transformers, of which only the callbacks list changes."""

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, LeanActivations, TokenDrop
from vit_families import COMMON


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        self.model = ViTForImageClassification(ViTConfig(**COMMON, num_labels=4))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return self.model(images, labels=labels).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(make_trainer, images, *callbacks):
    module = Classifier()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = make_trainer(*callbacks)
    trainer.fit(module, images.train_dataloader())
    return module, {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_fit__only_the_callbacks_list_changes(make_trainer, images, infos):
    callbacks = [BlockSelect([1, 3]), TokenDrop([1, 2], 0.5), LeanActivations(skip_unread=True)]
    module, changed = trained(make_trainer, images, *callbacks, ActivationMemoryMonitor())
    assert {name.split(".")[3] for name in changed if ".layers." in name} == {"1", "3"}
    outside = {name for name in changed if ".layers." not in name}
    assert {name.rpartition(".")[0] for name in outside} == {"model.classifier", "model.vit.layernorm"}
    assert (
        "TokenDrop: blocks 1, 2 of the ViT 'model' (ViTForImageClassification) keep 0.5 of the patch tokens: "
        "17 -> 10 -> 7 tokens."
    ) in infos
    assert all("forward" not in vars(layer) for layer in module.model.vit.layers)
    assert all(p.requires_grad for p in module.parameters())
    _, all_of_it = trained(make_trainer, images)
    assert changed < all_of_it


class TwoTowers(LightningModule):
    def __init__(self):
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        torch.manual_seed(0)
        text = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
        config = CLIPConfig(text_config=text, vision_config=COMMON, projection_dim=16)
        self.model = CLIPModel(config)

    def training_step(self, batch, batch_idx):
        words = torch.arange(24).view(4, 6)
        return self.model(input_ids=words, pixel_values=batch[0], return_loss=True).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def watched(layers):
    """Note how many tokens come out of each block, and whether it had its forward replaced."""
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda block, _, out: seen.append((out.shape[1], "forward" in vars(block))))
    return seen


def test_fit__of_clip_touches_its_vision_tower_alone(make_trainer, images):
    module = TwoTowers()
    vision, text = (watched(getattr(module.model, name).encoder.layers) for name in ("vision_model", "text_model"))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = make_trainer(BlockSelect([1, 3]), TokenDrop([1, 2], 0.5), limit_train_batches=1)
    trainer.fit(module, images.train_dataloader())
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert vision == [(17, False), (10, True), (7, True), (7, True)]
    assert text == [(6, False)] * 4
    in_vision = {name.split(".")[4] for name in changed if name.startswith("model.vision_model.encoder.")}
    in_text = {name.split(".")[4] for name in changed if name.startswith("model.text_model.encoder.")}
    assert (in_vision, in_text) == ({"1", "3"}, {"0", "1", "2", "3"})


@pytest.mark.parametrize("restore", [False, True])
def test_token_drop__hands_restore_on(make_trainer, images, restore):
    drop = TokenDrop([1], 0.5, restore=restore)
    module = Classifier()
    counts = watched(module.model.vit.layers)
    make_trainer(drop, limit_train_batches=1).fit(module, images.train_dataloader())
    assert counts[-1][0] == (17 if restore else 10)
