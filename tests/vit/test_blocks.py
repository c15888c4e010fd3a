import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from lightning_bsr import ConfigurationError, register_block
from lightning_bsr.vit import find_vit
from plain_modules import tiny_vit


class OwnBlock(nn.Module):
    """A user's block: a scale instead of LayerScale, a branch entry that may be None."""

    def __init__(self, dim, num_heads, **kwargs):
        super().__init__()
        inner = Block(dim, num_heads)
        self.ln, self.mixer, self.ff = inner.norm1, inner.attn, inner.mlp
        self.ln_ff = inner.norm2
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))
        self.extra = None

    def forward(self, x):
        x = x + self.gamma * self.mixer(self.ln(x))
        return x + 0.5 * self.ff(self.ln_ff(x))

    half = 0.5


class Child(OwnBlock):
    pass


class OverridingChild(OwnBlock):
    def forward(self, x):
        return x


@pytest.fixture
def _registered(monkeypatch):
    monkeypatch.setattr("lightning_bsr.vit._blocks._REGISTRY", {})
    register_block(
        OwnBlock, attn=["ln", "mixer", "gamma", "extra"], mlp=["ln_ff", "ff", "half"], self_attention="mixer"
    )


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("block_class", [OwnBlock, Child])
def test_register_block__branches_equal_the_own_forward(block_class):
    view = find_vit(tiny_vit(block_fn=block_class))
    block, spec, x = view.blocks[0], view.specs[0], torch.randn(2, 5, 32)
    y = x + spec.attention_branch(block, x)
    torch.testing.assert_close(y + spec.mlp_branch(block, y), block(x), rtol=0, atol=0)


@pytest.mark.usefixtures("_registered")
def test_register_block__parts():
    view = find_vit(tiny_vit(block_fn=OwnBlock))
    block = view.blocks[0]
    attn, mlp = view.specs[0].part_parameters(block, "attn"), view.specs[0].part_parameters(block, "mlp")
    assert {id(p) for p in attn + mlp} == {id(p) for p in block.parameters()}
    assert any(p is block.gamma for p in attn)


@pytest.mark.usefixtures("_registered")
def test_register_block__subclass_with_another_forward_is_not_covered():
    with pytest.raises(ConfigurationError, match="not registered"):
        find_vit(tiny_vit(block_fn=OverridingChild))


def test_register_block__errors():
    with pytest.raises(ConfigurationError) as error:
        register_block(OwnBlock, attn=["ln", "mixer"], mlp=["ff"])
    assert str(error.value) == (
        "register_block was given self_attention='attn', which is not in attn=['ln', 'mixer']; name the attribute of "
        "the attention branch that holds the self-attention."
    )
    with pytest.raises(ConfigurationError) as error:
        register_block(Child, attn=["ln", "mixer"], mlp=["ff"], self_attention="mixer")
    assert str(error.value) == (
        "register_block was given Child, which defines no forward of its own; register the class that does."
    )
