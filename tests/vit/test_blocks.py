import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from lightning_bsr import ConfigurationError, register_block
from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.vit import TokenTable, find_vit
from lightning_bsr.vit._blocks import _REGISTRY
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


class WholeBlock(OwnBlock):
    def forward(self, x):
        return x + self.mixer(self.ln(x)) + self.ff(self.ln(x))


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


def test_register_block__errors_of_branches_and_tables():
    for arguments, message in (
        (
            {"attn": ["mixer"], "mlp": [], "self_attention": "mixer"},
            "register_block was given attn=['mixer'] and mlp=[]; name the attributes of both branches, or of none "
            "for a block that is only run whole.",
        ),
        (
            {"attn": [], "mlp": [], "tables": [TokenTable("rope", neutral=(0.0, 1.0))]},
            "register_block was given a table 'rope', but after the tokens the forward of OwnBlock takes nothing.",
        ),
    ):
        with pytest.raises(ConfigurationError) as error:
            register_block(OwnBlock, **arguments)
        assert str(error.value) == message
    assert OwnBlock not in _REGISTRY


@pytest.mark.usefixtures("_registered")
def test_register_block__whole_block_drops_at_its_output_and_is_selected_whole():
    register_block(WholeBlock, attn=[], mlp=[])
    model = tiny_vit(block_fn=WholeBlock)
    install_token_drop(model, [1], 0.5)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(ConfigurationError) as error:
        select_blocks_(model, {1: "mlp"})
    assert str(error.value) == (
        "blocks[1] is 'mlp', but block 1 of the ViT (VisionTransformer) (WholeBlock) is known only as a whole; "
        "expected 'all'."
    )


class RotatedBlock(Block):
    """Takes a sine and a cosine as a tuple, by place."""

    def forward(self, x, angles):
        sine, cosine = angles
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        x = x + self.attn(self.norm1(x * cosine + turned * sine))
        return x + self.mlp(self.norm2(x))


@pytest.mark.usefixtures("_registered")
def test_register_block__tables_follow_the_tokens():
    register_block(RotatedBlock, attn=[], mlp=[], tables=[TokenTable("angles", neutral=(0.0, 1.0), per_head=False)])
    model = tiny_vit(block_fn=RotatedBlock, class_token=False, global_pool="avg", depth=3)
    angles = torch.rand(64, 32)
    x = torch.randn(2, 64, 32)
    install_token_drop(model, [0, 1], 0.5, fuse=False)
    seen = []
    model.blocks[2].norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    first = model.blocks[0](x, (angles.sin(), angles.cos()))
    positions = first[..., 32:].long() @ torch.tensor([256, 1])
    second = model.blocks[1](first, (angles.sin(), angles.cos()))
    left = second[..., 32:].long() @ torch.tensor([256, 1])
    model.blocks[2](second, (angles.sin(), angles.cos()))
    assert all(set(kept.tolist()) < set(before.tolist()) for kept, before in zip(left, positions, strict=True))
    y, table = second[..., :32], angles[left]
    turned = torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)
    torch.testing.assert_close(seen[0], y * table.cos() + turned * table.sin())
