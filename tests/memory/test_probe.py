import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_bsr.functional import install_token_drop
from lightning_bsr.memory._probe import limit_images, probe
from lightning_bsr.vit import find_vit
from plain_modules import tiny_vit


def batches(count=4, size=8):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 4
    # The brightness tells the class, so that there is something to learn.
    return [
        (torch.randn(size, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1), labels) for _ in range(count)
    ]


def run(model, keep_rates=(0.5,), drop_blocks=(0, 3, 5)):
    return probe(
        model,
        find_vit(model),
        batches(),
        training_loss=lambda batch: cross_entropy(model(batch[0]), batch[1]),
        drop_blocks=drop_blocks,
        keep_rates=keep_rates,
        drop_options={},
    )


def test_probe__gains_are_shares_of_all_halves():
    found = run(tiny_vit())
    assert set(found.gains) == {(block, part) for block in range(6) for part in ("attn", "mlp")}
    assert sum(found.gains.values()) == pytest.approx(1)
    assert min(found.gains.values()) > 0
    assert found.num_images == 32
    # The head was fitted: better than guessing one of four classes.
    assert found.loss < torch.tensor(4.0).log()


def test_probe__drop_losses_are_those_of_the_whole_model():
    model = tiny_vit()
    # Without a head to fit, the replayed loss must be the loss of an ordinary forward pass.
    model.head = torch.nn.Identity()
    view = find_vit(model)
    data = batches()

    def loss(batch):
        return cross_entropy(model(batch[0])[:, :4], batch[1])

    found = probe(model, view, data, training_loss=loss, drop_blocks=[1, 4], keep_rates=[0.5], drop_options={})
    with torch.no_grad():
        whole = [float(loss(batch)) for batch in data]
        for block in (1, 4):
            handle = install_token_drop(model, [block], 0.5)
            dropped = [float(loss(batch)) for batch in data]
            handle.remove()
            halves = [(slice(0, 2)), (slice(2, 4))]
            expected = sum((sum(dropped[h]) - sum(whole[h])) / sum(whole[h]) for h in halves) / 2
            assert found.drops[block, 0.5] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_probe__leaves_the_model_as_it_was():
    model = tiny_vit().train()
    model.blocks[0].requires_grad_(False)
    model.norm.weight.grad = torch.ones(32)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    run(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1], name
    assert torch.equal(model.norm.weight.grad, torch.ones(32))
    assert model.head.weight.grad is None
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in model.blocks)


def test_probe__more_dropping_costs_more():
    found = run(tiny_vit(), keep_rates=(0.9, 0.1), drop_blocks=(0,))
    assert abs(found.drops[0, 0.1]) > abs(found.drops[0, 0.9])


def test_limit_images():
    limited = limit_images(batches(4, 8), 10)
    assert [images.shape[0] for images, _ in limited] == [3, 3, 3, 3]
    assert next(labels.tolist() for _, labels in limited) == [0, 1, 2]
    assert [images.shape[0] for images, _ in limit_images(batches(4, 8), 1)] == [1, 1, 1, 1]
    assert [images.shape[0] for images, _ in limit_images(batches(2, 8), 1000)] == [8, 8]


def test_probe__an_interrupt_leaves_nothing_behind():
    model = tiny_vit().train()
    calls = []

    def loss(batch):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return cross_entropy(model(batch[0]), batch[1])

    options = {"drop_blocks": [0], "keep_rates": [0.5], "drop_options": {}}
    with pytest.raises(KeyboardInterrupt):
        probe(model, find_vit(model), batches(), training_loss=loss, **options)
    for block in model.blocks:
        assert not block._forward_pre_hooks
        assert not block._forward_hooks
        assert "forward" not in vars(block)
    assert model.training


def test_probe__a_step_that_calls_the_vit_twice():
    model = tiny_vit()
    model.head = torch.nn.Identity()
    data = batches()

    def loss(batch):
        images, labels = batch
        return cross_entropy(model(images)[:, :4] + model(images.flip(-1))[:, :4], labels)

    options = {"drop_blocks": [2], "keep_rates": [0.5], "drop_options": {}}
    found = probe(model, find_vit(model), data, training_loss=loss, **options)
    with torch.no_grad():
        whole = [float(loss(batch)) for batch in data]
        handle = install_token_drop(model, [2], 0.5)
        dropped = [float(loss(batch)) for batch in data]
        handle.remove()
    halves = [slice(0, 2), slice(2, 4)]
    expected = sum((sum(dropped[h]) - sum(whole[h])) / sum(whole[h]) for h in halves) / 2
    assert found.drops[2, 0.5] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_probe__random_augmentation_in_the_step_is_replayed():
    model = tiny_vit()
    model.head = torch.nn.Identity()

    def loss(batch):
        order = torch.randperm(len(batch[1]))
        return cross_entropy(model(batch[0][order])[:, :4], batch[1][order])

    options = {"drop_blocks": [5], "keep_rates": [1.0], "drop_options": {}}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = probe(model, find_vit(model), batches(), training_loss=loss, **options)
    # Keeping all tokens costs nothing, if the replayed images still belong to their labels.
    assert found.drops[5, 1.0] == pytest.approx(0, abs=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
