import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_bsr
from lightning_bsr import ConfigurationError
from lightning_bsr.vit import find_vit
from lightning_bsr.vit._classes import defines_forward
from vit_families import COMMON, FAMILIES, family

TEXT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
PREFIX = {"timm": 3, "deit": 2, "dinov2_with_registers": 5, "dinov3": 3, "siglip": 0, "siglip2": 0}


@pytest.mark.parametrize("name", FAMILIES)
def test_find_vit__families(name):
    made = family(name)
    view = find_vit(nn.ModuleDict({"inside": made.model}))
    assert view.blocks == tuple(made.blocks)
    assert view.num_prefix_tokens == PREFIX.get(name, 1)
    assert view.has_class_token == (made.score == "cls")
    assert (view.num_patch_tokens, view.width) == (16, 48)
    assert view.places is None
    covered = {p for part in (*view.parts, *view.blocks) for p in part.parameters()}
    # The class token and positions that some keep as their own, beside what they consist of.
    own = {id(p) for owner in (view.model, view.trunk, made.model) for p in owner.parameters(recurse=False)}
    if name == "torchvision":
        own.add(id(made.model.encoder.pos_embedding))
    assert all(p in covered or id(p) in own for p in view.model.parameters())


@pytest.mark.parametrize("path", ["one.vit", "one.vit.layers", "one"])
def test_find_vit__any_path_that_singles_one_out(path):
    module = nn.ModuleDict({"one": family("vit").model, "two": family("torchvision").model})
    assert find_vit(module, path).model is module["one"]
    with pytest.raises(ConfigurationError) as error:
        find_vit(module)
    assert str(error.value) == (
        "ModuleDict holds 2 Vision Transformers: 'one' (ViTForImageClassification, 4 blocks), 'two' "
        "(VisionTransformer, 4 blocks); name one of them with vit=, such as vit='one'."
    )


def test_find_vit__clip_has_one_and_its_text_tower_none():
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=COMMON))
    view = find_vit(model)
    assert (view.path, view.blocks_path) == ("vision_model", "vision_model.encoder.layers")
    with pytest.raises(ConfigurationError, match="No supported Vision Transformer was found in 'text_model'"):
        find_vit(model, "text_model")


def test_find_vit__the_trunk_alone():
    made = family("vit")
    view = find_vit(made.model.vit)
    assert view.model is view.trunk is made.model.vit
    assert (view.norms, view.heads, view.reads_prefix_alone) == ((made.model.vit.layernorm,), (), False)
    assert find_vit(made.model).reads_prefix_alone


def test_find_vit__a_subclass_of_a_block_that_inherits_its_forward():
    made = family("vit")

    class Sharded(type(made.blocks[0])):
        """As FSDP makes one of every block's class, which transformers then gives a wrapper of the same forward."""

    for block in made.blocks:
        block.__class__ = Sharded
    assert "forward" in vars(Sharded)
    assert defines_forward(made.blocks[0]).__name__ == "ViTLayer"
    assert len(find_vit(made.model).blocks) == 4


def test_find_vit__a_block_of_that_name_with_other_parts_is_not_taken_for_it():
    made = family("vit")
    for block in made.blocks:
        block.output, block.mlp_of_old = block.dropout, block.mlp
        del block.mlp
    with pytest.raises(ConfigurationError) as error:
        find_vit(made.model)
    assert "Found blocks that are not registered: 'vit.layers' (4 x transformers.models.vit" in str(error.value)


def test_package__imports_no_transformers():
    for file in Path(lightning_bsr.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "transformers" for name in names), file


def test_num_patch_tokens__of_what_masked_autoencoders_leave():
    from transformers import ViTMAEConfig, ViTMAEModel

    model = ViTMAEModel(ViTMAEConfig(**COMMON, mask_ratio=0.75))
    view = find_vit(model)
    assert view.num_patch_tokens == 4
    assert model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[1] == 5
