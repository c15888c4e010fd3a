import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from lightning_bsr import BlockSelect, ConfigurationError
from plain_modules import BuildsInConfigureModel, PlainModule, tiny_vit


class Two(PlainModule):
    """A student that trains and a teacher that does not take part."""

    def __init__(self):
        super().__init__()
        self.teacher = tiny_vit(depth=2)


def test_block_select__one_line_says_what_trains(make_trainer, images, infos):
    make_trainer(BlockSelect([1, -1])).fit(PlainModule(), images)
    assert (
        "BlockSelect: blocks 1, 5 of 6 train in the ViT 'model' (VisionTransformer): 25,604 of 80,100 parameters "
        "(32.0 %)."
    ) in infos


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_block_select__two_vits_with_a_callback_each(make_trainer, images, tmp_path):
    module = Two()
    callbacks = [BlockSelect([1], vit="model"), BlockSelect([0], vit="teacher", head=False)]
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(*callbacks, checkpoint, enable_checkpointing=True)
    trainer.fit(module, images)
    assert len({callback.state_key for callback in callbacks}) == 2
    make_trainer(*callbacks, checkpoint, enable_checkpointing=True, max_epochs=2).fit(
        module, images, ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )


def test_block_select__two_on_one_vit_are_refused_and_leave_no_trace(make_trainer, images):
    module = PlainModule()
    with pytest.raises(ConfigurationError, match="has its blocks selected already"):
        make_trainer(BlockSelect([1]), BlockSelect([2], vit="model")).fit(module, images)
    assert all(p.requires_grad for p in module.parameters())


def test_block_select__nothing_to_train(make_trainer, images):
    module = PlainModule()
    with pytest.raises(ConfigurationError) as error:
        make_trainer(BlockSelect([], head=False, norm=False)).fit(module, images)
    assert str(error.value) == (
        "BlockSelect(blocks=[], head=False, norm=False) leaves nothing to train in PlainModule; select a block, the "
        "head or the norm."
    )
    assert all(p.requires_grad for p in module.parameters())


def test_block_select__frozen_blocks_rest_although_the_module_calls_train(make_trainer, images):
    class Wakes(PlainModule):
        def __init__(self):
            super().__init__()
            self.modes = []

        def on_validation_model_train(self):
            self.train()

        def training_step(self, batch, batch_idx):
            self.modes.append([block.training for block in self.model.blocks])
            return super().training_step(batch, batch_idx)

    module = Wakes()
    make_trainer(BlockSelect([1]), val_check_interval=2).fit(module, images)
    assert module.modes == [[False, True, False, False, False, False]] * 4


def test_block_select__the_optimizer_holds_no_state_for_frozen_parameters(make_trainer, images):
    module = PlainModule()
    trainer = make_trainer(BlockSelect([1]))
    trainer.fit(module, images)
    frozen = {
        id(p)
        for name, p in module.named_parameters()
        if not name.startswith(("model.blocks.1.", "model.norm", "model.head"))
    }
    assert not [p for p in trainer.optimizers[0].state if id(p) in frozen]


def test_block_select__beside_weight_averaging(make_trainer, images, recwarn):
    module = BuildsInConfigureModel()
    make_trainer(WeightAveraging(), BlockSelect([1])).fit(module, images)
    assert all(p.requires_grad for p in module.parameters())
