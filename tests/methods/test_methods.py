import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn

from lightning_bsr import ConfigurationError, FineTune, ViTClassifier
from lightning_bsr.functional import select_blocks_
from lightning_bsr.memory import measure
from lightning_bsr.methods import METHODS, apply_method_
from plain_modules import BuildsInConfigureModel, PlainModule, tiny_vit

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
ALL = [*METHODS]
WITHOUT_DATA = [name for name in ALL if name != "bsr_auto"]  # the others need no batches to be applied

pytestmark = pytest.mark.usefixtures("short_frontier")


@pytest.fixture(autouse=True)
def _needs_peft(request):
    if "lora" in request.node.name:
        pytest.importorskip("peft")


def state(module):
    """What a method may change and must put back."""
    return {
        "flags": {name: p.requires_grad for name, p in module.named_parameters()},
        "modes": {name: m.training for name, m in module.named_modules()},
        "keys": list(module.state_dict()),
        "own": {name: {"forward", "peft_config"} & set(vars(m)) for name, m in module.named_modules()},
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in module.named_modules()},
    }


class Spy(Callback):
    """Notes losses, and what changes the forward function while a run goes on."""

    def __init__(self):
        self.losses = []
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.seen["fit"] = self._outputs(pl_module)

    def on_test_batch_end(self, trainer, pl_module, *args):
        self.seen["test"] = self._outputs(pl_module)

    def _outputs(self, pl_module):
        training = pl_module.training
        with torch.no_grad():
            out = pl_module.eval().model(X)
        pl_module.train(training)
        return out


def test_methods__are_listed():
    assert ALL == [
        "full",
        "head",
        "bitfit",
        "lora",
        "checkpoint",
        "int8_activations",
        "sparse_activations",
        "side_network",
        "token_drop",
        "last_blocks",
        "bsr",
        "bsr_auto",
    ]
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary.endswith(".")


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_apply_method__trains_and_is_undone(name):
    model = tiny_vit().train()
    model.pos_embed.requires_grad_(False)
    before = state(model)
    handle = apply_method_(model, name)
    handle.eval_frozen()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert str(handle).startswith(f"{name}: ")
    handle.remove()
    handle.remove()
    assert state(model) == before


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_apply_method__survives_deepcopy(name):
    model = tiny_vit()
    apply_method_(model, name)
    assert torch.equal(copy.deepcopy(model)(X), model(X))


@pytest.mark.parametrize("name", [name for name in WITHOUT_DATA if name != "full"])
def test_apply_method__keeps_less_than_full_training(name):
    model = tiny_vit()
    full = measure(model, X).activations
    apply_method_(model, name)
    assert measure(model, X).activations < full


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "bsr",
            "bsr: blocks 3, 7, 11 of 12 train in the ViT (VisionTransformer): 38,308 of 156,324 parameters (24.5 %); "
            "blocks 3, 6, 9 of the ViT (VisionTransformer) keep 0.5 of the patch tokens: 65 -> 34 -> 19 -> 11 tokens",
        ),
        (
            "last_blocks",
            "last_blocks: blocks 9, 10, 11 of 12 train in the ViT (VisionTransformer): 38,308 of 156,324 parameters "
            "(24.5 %)",
        ),
        (
            "token_drop",
            "token_drop: everything trains in the ViT (VisionTransformer): 156,324 of 156,324 parameters (100.0 %); "
            "blocks 3, 6, 9 of the ViT (VisionTransformer) keep 0.7 of the patch tokens: 65 -> 47 -> 35 -> 26 tokens",
        ),
    ],
)
def test_apply_method__published_defaults(name, expected):
    assert str(apply_method_(tiny_vit(depth=12), name)) == expected


def test_apply_method__drops_in_shallow_models_and_without_a_class_token():
    assert list(apply_method_(tiny_vit(depth=2), "token_drop").parts[1].forwards) == [0, 1]
    model = tiny_vit(class_token=False, global_pool="avg")
    assert apply_method_(model, "bsr").parts[1].forwards[1].score == "mean"


def test_apply_method__for_evaluation_changes_the_function_only():
    model, drop = tiny_vit(), tiny_vit()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    apply_method_(drop, "bsr")
    handle = apply_method_(model, "bsr", evaluation=True)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(model(X), drop(X))
    handle.remove()
    assert apply_method_(model, "int8_activations", evaluation=True).parts == ()


def test_apply_method__finds_the_vit_by_path():
    module = nn.ModuleDict({"a": tiny_vit(), "b": tiny_vit()})
    apply_method_(module, "head", vit="a")
    assert not module["a"].pos_embed.requires_grad
    assert module["b"].pos_embed.requires_grad


def test_apply_method__undoes_the_first_part_when_the_second_fails():
    model = tiny_vit()
    before = state(model)
    with pytest.raises(ConfigurationError) as error:
        apply_method_(model, "bsr", drop_blocks=[9])
    assert str(error.value) == (
        "blocks has 9, but the ViT (VisionTransformer) has 6 blocks, numbered 0 to 5 or -6 to -1."
    )
    assert state(model) == before


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "adapters",
            {},
            "method is 'adapters', expected one of full, head, bitfit, lora, checkpoint, int8_activations, "
            "sparse_activations, side_network, token_drop, last_blocks, bsr, bsr_auto.",
        ),
        ("lora", {"r": 4}, "The method 'lora' has no option 'r'; its options are rank, alpha, dropout, targets, head."),
        ("full", {"lr": 4}, "The method 'full' has no option 'lr'; its options are none."),
        (
            "bsr_auto",
            {},
            "The method 'bsr_auto' chooses by training batches, which a module alone has not; use it with the "
            "callback FineTune, or give batches to lightning_bsr.memory.fit_budget.",
        ),
        ("last_blocks", {"count": 7}, "count is 7, expected 0 to 6, the number of blocks."),
    ],
)
def test_apply_method__errors(method, options, message):
    with pytest.raises(ConfigurationError) as error:
        apply_method_(tiny_vit(), method, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ALL)
def test_fine_tune__fits_and_leaves_nothing_behind(name, make_trainer, images):
    module, spy = PlainModule(drop_path_rate=0.1, depth=4), Spy()
    before = state(module)
    make_trainer(FineTune(name), spy, limit_train_batches=2).fit(module, images)
    assert len(spy.losses) == 2
    assert torch.tensor(spy.losses).isfinite().all()
    assert state(module) == before


@pytest.mark.parametrize("name", ALL)
def test_fine_tune__test_after_fit_evaluates_what_was_trained(name, make_trainer, images):
    module, spy = PlainModule(depth=4), Spy()
    trainer = make_trainer(FineTune(name), spy, limit_train_batches=2)
    trainer.fit(module, images)
    before = state(module)
    trainer.test(module, images, verbose=False)
    torch.testing.assert_close(spy.seen["test"], spy.seen["fit"])
    assert state(module) == before


class Save(Callback):
    """Saves a checkpoint at the end of the first epoch, while the method is in place."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", ALL)
def test_fine_tune__checkpoint_tests_in_a_new_process(name, make_trainer, images, tmp_path):
    spy, other = Spy(), Spy()
    make_trainer(FineTune(name), spy, Save(tmp_path / "c.ckpt")).fit(PlainModule(depth=4), images)
    # What stands in for another process: another module and another callback.
    module = PlainModule(depth=4)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    make_trainer(FineTune(name), other).test(module, images, ckpt_path=tmp_path / "c.ckpt", verbose=False)
    torch.testing.assert_close(other.seen["test"], spy.seen["fit"])


@pytest.mark.parametrize("name", ["lora", "side_network", "bsr"])
def test_fine_tune__resumed_training_equals_uninterrupted(name, make_trainer, images, tmp_path):
    path = tmp_path / "c.ckpt"
    uninterrupted, resumed = Spy(), Spy()
    make_trainer(FineTune(name), Save(path), uninterrupted, max_epochs=2).fit(PlainModule(), images)
    make_trainer(FineTune(name), resumed, max_epochs=2).fit(PlainModule(), images, ckpt_path=path)
    assert resumed.losses == uninterrupted.losses[4:]
    assert torch.equal(resumed.seen["fit"], uninterrupted.seen["fit"])


def test_fine_tune__refuses_to_resume_from_another_method(make_trainer, images, tmp_path):
    path = tmp_path / "c.ckpt"
    make_trainer(FineTune("bsr"), Save(path)).fit(PlainModule(), images)
    with pytest.raises(ConfigurationError) as error:
        make_trainer(FineTune("head"), max_epochs=2).fit(PlainModule(), images, ckpt_path=path)
    assert str(error.value) == (
        "The checkpoint was trained with FineTune('bsr'), which differs from the present FineTune('head'), so the "
        "optimizer's state does not fit; resume with the same method, or load only the weights."
    )


def test_fine_tune__side_network_goes_on_training_in_a_second_fit(make_trainer, images):
    callback, module = FineTune("side_network"), PlainModule()
    trainer = make_trainer(callback, limit_train_batches=1)
    trainer.fit(module, images)
    network = callback._side.network
    weight = network.up.weight.detach().clone()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, images)
    assert callback._side.network is network
    assert not torch.equal(network.up.weight, weight)
    # Another module gets a network of its own.
    make_trainer(callback, fast_dev_run=True).fit(PlainModule(), images)
    assert callback._side.network is not network


def test_fine_tune__frozen_parts_rest_while_training(make_trainer, images):
    class Modes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.training = [block.training for block in pl_module.model.blocks]

    modes = Modes()
    make_trainer(FineTune("last_blocks", {"count": 2}), modes, fast_dev_run=True).fit(PlainModule(), images)
    assert modes.training == [False] * 4 + [True] * 2


@pytest.mark.parametrize("name", ["lora", "side_network", "bsr"])
def test_fine_tune__late_builders_and_the_bundled_classifier(name, make_trainer, images):
    make_trainer(FineTune(name), fast_dev_run=True).fit(BuildsInConfigureModel(), images)
    classifier = ViTClassifier(num_classes=4, layer_decay=0.8)
    make_trainer(FineTune(name), fast_dev_run=True).fit(classifier, images)


def test_fine_tune__says_what_it_does(make_trainer, images, infos):
    make_trainer(FineTune("head"), fast_dev_run=True).fit(PlainModule(), images)
    assert (
        "FineTune: head: no block of 6 trains in the ViT 'model' (VisionTransformer): 132 of 80,100 parameters "
        "(0.2 %)." in infos
    )


def test_fine_tune__checks_its_arguments_at_once():
    with pytest.raises(ConfigurationError):
        FineTune("adapters")
    with pytest.raises(ConfigurationError):
        FineTune("lora", {"r": 8})


def test_fine_tune__refuses_a_chosen_module(make_trainer, images):
    module = PlainModule()
    select_blocks_(module, 1)
    before = state(module)
    with pytest.raises(ConfigurationError):
        make_trainer(FineTune("bsr"), fast_dev_run=True).fit(module, images)
    assert state(module) == before
