import pytest
import torch
from lightning.pytorch import Callback

from lightning_bsr import ActivationCheckpoint, ConfigurationError, TokenDrop
from lightning_bsr.functional._checkpoint import RECOMPUTE_OBSERVERS
from plain_modules import BuildsInConfigureModel, PlainModule


@pytest.fixture
def recomputed():
    seen = []
    RECOMPUTE_OBSERVERS.append(seen.append)
    yield seen
    RECOMPUTE_OBSERVERS.remove(seen.append)


def test_fit__weights_are_equal_bit_for_bit(make_trainer, images, recomputed):
    plain, module = PlainModule(), PlainModule()
    make_trainer(TokenDrop([1, 3], 0.5), limit_train_batches=2).fit(plain, images)
    make_trainer(TokenDrop([1, 3], 0.5), ActivationCheckpoint([0, 1, -1]), limit_train_batches=2).fit(module, images)
    for (name, ours), theirs in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert recomputed == [True, False] * 3 * 2
    assert all("forward" not in vars(block) for block in module.model.blocks)


def test_fit__says_what_it_does(make_trainer, images, infos):
    make_trainer(ActivationCheckpoint(), fast_dev_run=True).fit(PlainModule(), images)
    message = "all 6 blocks of the ViT 'model' (VisionTransformer) are computed again in backward"
    assert f"ActivationCheckpoint: {message}." in infos


def test_fit__of_a_module_that_builds_late(make_trainer, images, recomputed):
    make_trainer(ActivationCheckpoint(), fast_dev_run=True).fit(BuildsInConfigureModel(), images)
    assert recomputed == [True, False] * 6


def test_fit__an_error_detaches(make_trainer, images):
    class Fails(Callback):
        def on_train_start(self, trainer, pl_module):
            raise ValueError("stop")

    module = PlainModule()
    with pytest.raises(ValueError, match="stop"):
        make_trainer(ActivationCheckpoint(), Fails()).fit(module, images)
    assert all("forward" not in vars(block) for block in module.model.blocks)


def test_fit__checks_blocks(make_trainer, images):
    with pytest.raises(ConfigurationError) as error:
        make_trainer(ActivationCheckpoint(["a"])).fit(PlainModule(), images)
    assert str(error.value) == (
        "blocks has 'a', expected whole numbers: the ViT 'model' (VisionTransformer) has 6 blocks, numbered 0 to 5 or "
        "-6 to -1."
    )


def test_evaluation__attaches_nothing(make_trainer, images):
    class Spy(Callback):
        def on_test_start(self, trainer, pl_module):
            assert all("forward" not in vars(block) for block in pl_module.model.blocks)

    make_trainer(ActivationCheckpoint(), Spy()).test(PlainModule(), images, verbose=False)
