import pytest
from lightning.pytorch import Callback

from lightning_bsr import ConfigurationError, TokenDrop
from plain_modules import PlainModule


class Tokens(Callback):
    """Notes how many tokens leave the last block, by epoch and stage."""

    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        self.stage = None
        self.hook = pl_module.model.blocks[-1].register_forward_hook(
            lambda _m, _i, output: self.seen.append((trainer.current_epoch, trainer.state.stage.value, output.shape[1]))
        )

    def on_fit_end(self, trainer, pl_module):
        self.hook.remove()


def test_token_drop__one_line_says_where_tokens_go(make_trainer, images, infos):
    make_trainer(TokenDrop([1, 3], [0.5, 0.25])).fit(PlainModule(), images)
    assert (
        "TokenDrop: blocks 1, 3 of the ViT 'model' (VisionTransformer) keep 0.5, 0.25 of the patch tokens: "
        "65 -> 34 -> 11 tokens."
    ) in infos


def test_token_drop__warm_up_over_epochs_in_training_and_validation(make_trainer, images):
    tokens = Tokens()
    make_trainer(TokenDrop([1], 0.5, warmup_epochs=2), tokens, max_epochs=3).fit(PlainModule(), images)
    assert set(tokens.seen) == set(
        [(epoch, stage, n) for epoch, n in ((0, 65), (1, 50), (2, 34)) for stage in ("train", "validate")]
        + [(0, "sanity_check", 65)]
    )


def test_token_drop__two_callbacks_on_different_blocks(make_trainer, images):
    tokens = Tokens()
    make_trainer(TokenDrop([1], 0.5), TokenDrop([3], 0.5, fuse=False), tokens).fit(PlainModule(), images)
    assert {n for _, _, n in tokens.seen} == {18}


def test_token_drop__negative_warm_up():
    with pytest.raises(ConfigurationError) as error:
        TokenDrop([1], 0.5, warmup_epochs=-1)
    assert str(error.value) == "warmup_epochs is -1, expected 0 or more."
