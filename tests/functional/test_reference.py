"""The published implementation's outputs and gradients, as recorded in tests/fixtures."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from lightning_bsr.functional import install_token_drop, select_blocks_
from plain_modules import tiny_vit


@pytest.mark.parametrize("name", ["bsr_reference_fused", "bsr_reference_dropped"])
def test_published_semantics__logits_loss_gradients_and_tokens(fixtures, name):
    path = fixtures / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    geometry = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    model = tiny_vit(**{key: config[key] for key in geometry})
    model.load_state_dict({key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")})
    select_blocks_(model, config["train_blocks"])
    handle = install_token_drop(model, config["drop_blocks"], config["keep_rate"], fuse=config["fuse"])

    tokens = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: tokens.append(output.shape[1]))
    logits = model(tensors["images"])
    loss = F.cross_entropy(logits, tensors["labels"])
    loss.backward()

    assert tokens == config["tokens_after_block"] == handle.num_tokens(64)
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, tensors["loss"].squeeze(), rtol=0, atol=1e-5)
    expected = {key.removeprefix("grad."): t for key, t in tensors.items() if key.startswith("grad.")}
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).norm() <= 1e-5 * gradient.norm(), key
