import pytest
import torch

from lightning_bsr import ConfigurationError
from lightning_bsr.memory import Configuration
from plain_modules import tiny_vit

WHOLE = ("attn", "mlp")


def test_configuration__installs_all_three_levers_and_takes_them_out():
    model = tiny_vit()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    lean = {4: {"attn": "exact", "mlp": "recompute"}, 5: {"attn": "recompute", "mlp": "recompute"}}
    configuration = Configuration({4: ("mlp",), 5: WHOLE}, {1: 0.5, 3: 0.7}, lean)
    installed = configuration.install(model)
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad and "blocks" in name}
    assert trained == {"4", "5"}
    assert not model.blocks[4].attn.qkv.weight.requires_grad
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert "blocks 1, 3" in str(installed)
    assert (
        "blocks 4, 5 of 6 of the ViT (VisionTransformer) keep lean activations (exact: 4 (attn); recompute: 4 (mlp), 5)"
        in str(installed)
    )
    installed.remove()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any("forward" in vars(block) for block in model.blocks)


def test_configuration__undoes_what_it_did_when_a_later_part_fails():
    model = tiny_vit()
    with pytest.raises(ConfigurationError, match=r"keep_rate is 2\.0"):
        Configuration({5: WHOLE}, {1: 2.0}).install(model)
    assert all(p.requires_grad for p in model.parameters())
    Configuration({5: WHOLE}).install(model).remove()


def test_configuration__as_callbacks_and_as_values():
    lean = {4: {"attn": "exact", "mlp": "recompute"}, 5: {"attn": "exact", "mlp": "exact"}}
    configuration = Configuration({4: ("mlp",), 5: WHOLE}, {1: 0.5}, lean, {"score": "mean"})
    assert configuration.callbacks() == [
        {"class_path": "BlockSelect", "init_args": {"blocks": {4: ["mlp"], 5: "all"}}},
        {"class_path": "TokenDrop", "init_args": {"blocks": [1], "keep_rate": [0.5], "score": "mean"}},
        {"class_path": "LeanActivations", "init_args": {"policy": {4: lean[4], 5: "exact"}}},
    ]
    assert Configuration({5: WHOLE}).callbacks() == [{"class_path": "BlockSelect", "init_args": {"blocks": [5]}}]
    assert Configuration.from_dict(configuration.to_dict()) == configuration
    assert str(configuration) == "train 4 (mlp), 5; drop 1 @ 0.5; recompute 4 (mlp); exact 4 (attn), 5"
    assert str(Configuration({})) == "train the head only"
