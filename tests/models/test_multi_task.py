"""Multi-task training on real digits: alternate and joint updates, with and without experts and BSR."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from PIL import Image

from lightning_bsr import (
    ActivationMemoryMonitor,
    BlockSelect,
    ConfigurationError,
    DigitsDataModule,
    DrawExpertUse,
    LeanActivations,
    MultiTaskClassifier,
    MultiTaskDataModule,
    ReleaseGradients,
    TokenDrop,
)
from lightning_bsr.models import draw_expert_use
from lightning_bsr.planning import plan_fit
from processes import in_two_processes

TINY = {"depth": 3, "embed_dim": 48, "num_heads": 2}
EXPERTS = {"blocks": [1, 2], "num_experts": 4, "top_k": 2}


class Parity(DigitsDataModule):
    """Whether a digit is odd."""

    def setup(self, stage=None):
        super().setup(stage)
        for subset in self.datasets.values():
            images, labels = subset.dataset.tensors
            subset.dataset = torch.utils.data.TensorDataset(images, labels % 2)

    @property
    def class_names(self):
        return ["even", "odd"]


def data(**kwargs):
    return MultiTaskDataModule(
        {"digits": DigitsDataModule(batch_size=8, augment=False), "parity": Parity(batch_size=4, augment=False)},
        **kwargs,
    )


def tiny(**kwargs):
    torch.manual_seed(0)
    defaults = {"model_name": "vit_micro_patch4_32", "pretrained": False, "model_kwargs": TINY}
    return MultiTaskClassifier({"digits": 10, "parity": 2}, **{**defaults, **kwargs})


def levers():
    return [BlockSelect([1, 2]), TokenDrop([1], 0.5)]


class Steps(Callback):
    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(([*batch], trainer.global_step, {k: v.clone() for k, v in pl_module.state_dict().items()}))


@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
def test_fit__tasks_take_turns_with_a_step_each_under_bsr(experts, make_trainer):
    model, steps, monitor = tiny(experts=experts), Steps(), ActivationMemoryMonitor()
    trainer = make_trainer(*levers(), LeanActivations(), monitor, steps, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(model, data(alpha=0))
    assert [(tasks, step) for tasks, step, _ in steps.weights] == [
        (["digits"], 1),
        (["parity"], 2),
        (["digits"], 3),
        (["parity"], 4),
    ]
    (_, _, first), (_, _, second) = steps.weights[:2]
    changed = {name for name, value in first.items() if not torch.equal(value, second[name])}
    assert "heads.1.weight" in changed
    assert not [name for name in changed if name.startswith("model.blocks.0")]
    metrics = trainer.callback_metrics
    assert {"train/loss", "train/digits/loss", "train/parity/accuracy", "val/digits/loss"} <= {*metrics}
    mean = (metrics["val/digits/accuracy"] + metrics["val/parity/accuracy"]) / 2
    torch.testing.assert_close(metrics["val/accuracy"], mean)
    if experts:
        assert "model.blocks.1.mlp.fc1.weight" in changed
        assert 1 <= metrics["val/parity/experts"] <= 4
        assert metrics["train/balance_loss"] > 0
    else:
        assert not [name for name in metrics if "experts" in name or "balance" in name]


def test_fit__gates_are_of_their_task_alone(make_trainer):
    model, steps = tiny(experts=EXPERTS, weight_decay=0.0, optimizer="sgd", momentum=0.0), Steps()
    trainer = make_trainer(steps, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(model, data(alpha=0))
    (_, _, before), (tasks, _, after) = steps.weights[1:3]
    assert tasks == ["digits"]
    assert not torch.equal(before["model.blocks.1.mlp.gates.0.weight"], after["model.blocks.1.mlp.gates.0.weight"])
    assert torch.equal(before["model.blocks.1.mlp.gates.1.weight"], after["model.blocks.1.mlp.gates.1.weight"])
    assert torch.equal(before["heads.1.weight"], after["heads.1.weight"])


@pytest.mark.parametrize("lean", [False, True])
def test_fit__a_joint_batch_is_one_step_like_accumulated_turns(lean, make_trainer):
    def weights(joint, **options):
        model = tiny(experts=EXPERTS, optimizer="sgd", weight_decay=0.0, lr=0.1)
        callbacks = [*levers(), *([LeanActivations("recompute")] if lean else [])]
        trainer = make_trainer(*callbacks, limit_train_batches=1, limit_val_batches=0, **options)
        trainer.fit(model, data(alpha=0, joint=joint))
        assert trainer.global_step == 1
        return model.state_dict()

    start = tiny(experts=EXPERTS).state_dict()
    joint, turns = weights(True), weights(False, accumulate_grad_batches=2)
    for name, value in joint.items():
        # Lightning divides an accumulated loss by the number of batches.
        torch.testing.assert_close(value - start[name], 2 * (turns[name] - start[name]), rtol=1e-3, atol=1e-6)
    assert not torch.equal(joint["model.blocks.1.mlp.gates.0.weight"], start["model.blocks.1.mlp.gates.0.weight"])


def test_training_step__adds_up_weighted_losses_and_balance():
    model = tiny(experts=EXPERTS, loss_weights={"parity": 0.25}, balance_weight=2.0)
    logged = {}
    model.log = lambda name, value, **_: logged.__setitem__(name, value)
    images = {"digits": torch.randn(3, 3, 32, 32), "parity": torch.randn(2, 3, 32, 32)}
    labels = {"digits": torch.tensor([1, 2, 3]), "parity": torch.tensor([0, 1])}
    total = model.training_step({task: (images[task], labels[task]) for task in images}, 0)
    expected = torch.zeros(())
    for task, weight in (("digits", 1.0), ("parity", 0.25)):
        expected = expected + weight * F.cross_entropy(model(images[task], task), labels[task])
        expected = expected + 2.0 * model.experts.balance_loss()
    torch.testing.assert_close(total, expected)
    assert torch.equal(logged["train/loss"], total.detach())


@pytest.mark.parametrize(
    ("joint", "strategy"), [(True, "ddp"), (False, "ddp_find_unused_parameters_true")], ids=["joint", "in turns"]
)
def test_ddp__both_processes_train_the_same_weights(joint, strategy, make_trainer, tmp_path):
    def fit(rank):
        model = tiny()
        # Parameters that get no gradient would make DDP fail in the next step.
        limits = {"limit_train_batches": 2, "limit_val_batches": 0}
        trainer = make_trainer(*levers(), devices=2, strategy=strategy, **limits)
        trainer.fit(model, data(alpha=0, joint=joint))
        return trainer.global_step, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    (steps, first), (_, second) = in_two_processes(fit, tmp_path)
    assert steps == (2 if joint else 4)
    before = tiny().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in before)
    changed = {
        name.split(".")[2] for name in before if ".blocks." in name and not torch.equal(first[name], before[name])
    }
    assert changed == {"1", "2"}
    for key in ("heads.0.weight", "heads.1.weight"):
        assert not torch.equal(first[key], before[key])


def test_training_step__learns_both_tasks():
    model = tiny(experts=EXPERTS)
    model.log = lambda *_, **__: None
    batches = [{task: next(iter(module.train_dataloader()))} for task, module in data().tasks.items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        losses.append(model.training_step(batches[step % 2], step))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    first, last = (torch.stack(some).detach() for some in (losses[:2], losses[-4:-2]))
    assert (last < 0.9 * first).all()


def test_plan__of_a_step_is_what_is_measured():
    planned, measured = plan_fit(
        tiny(experts=EXPERTS), data(), levers(), also_measure=True, accelerator="cpu", limit_val_batches=0
    )
    assert planned == measured
    assert planned.batch_size == 4  # of the task with more batches, which begins


def test_fit__releases_gradients(make_trainer):
    trainer = make_trainer(*levers(), ReleaseGradients(), limit_train_batches=1, limit_val_batches=0)
    trainer.fit(tiny(experts=EXPERTS), data(alpha=0))
    assert trainer.global_step == 2


def test_checkpoint__loads_and_predicts_the_same(make_trainer, tmp_path):
    model = tiny(experts=EXPERTS)
    trainer = make_trainer(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = MultiTaskClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images, "parity")
    assert torch.equal(again(images, "parity"), expected)
    assert torch.equal(copy.deepcopy(again)(images, "parity"), expected)
    assert torch.equal(pickle.loads(pickle.dumps(again.model))(images), model.model(images))
    predicted = make_trainer(limit_predict_batches=1).predict(again, data())
    assert [{task: tuple(p.shape) for task, p in batches[0].items()} for batches in predicted] == [
        {"digits": (8, 10)},
        {"parity": (4, 2)},
    ]


def test_draw__a_heat_map_of_tasks_and_experts_for_each_block(make_trainer, tmp_path):
    model = tiny(experts=EXPERTS)
    make_trainer(DrawExpertUse(), limit_test_batches=1).test(model, data(), verbose=False)
    with Image.open(tmp_path / "experts-test.png") as picture:
        assert min(picture.size) > 100
    figure = draw_expert_use(model.experts)
    panels = figure.axes[:2]
    assert [axes.get_title() for axes in panels] == ["block 1", "block 2"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["digits", "parity"]
    shares = panels[0].images[0].get_array()
    assert shares.shape == (2, 4)
    torch.testing.assert_close(torch.tensor(shares).sum(1), torch.ones(2))


def test_shared_gate__for_all_tasks(make_trainer):
    model = tiny(experts=EXPERTS, gate_per_task=False)
    trainer = make_trainer(limit_train_batches=1, limit_val_batches=1)
    trainer.fit(model, data())
    assert "val/all/experts" in trainer.callback_metrics
    assert len(model.model.blocks[1].mlp.gates) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": {}}, "num_classes is {}, expected the number of classes of one task or more, by name."),
        ({"num_classes": {"a": 1}}, "num_classes['a'] is 1, expected 2 or more."),
        ({"loss_weights": {"cars": 1.0}}, "The task is 'cars', expected one of 'digits', 'parity'."),
        ({"loss_weights": {"digits": -1.0}}, "loss_weights['digits'] is -1.0, expected 0 or more."),
        ({"balance_weight": -1.0}, "balance_weight is -1.0, expected 0 or more."),
        ({"lr": 0.0}, "lr is 0.0, expected a number above 0."),
        (
            {"experts": {"number": 3}},
            "experts is {'number': 3}, expected a mapping with blocks, num_experts, top_k, renormalize, noise_std, "
            "capacity_factor, or None.",
        ),
    ],
)
def test_classifier__refuses(arguments, message):
    with pytest.raises(ConfigurationError) as error:
        MultiTaskClassifier(**{"num_classes": {"digits": 10, "parity": 2}, "pretrained": False, **arguments})
    assert str(error.value) == message


def test_classifier__refuses_an_unknown_task():
    with pytest.raises(ConfigurationError) as error:
        tiny()(torch.randn(1, 3, 32, 32), "cars")
    assert str(error.value) == "The task is 'cars', expected one of 'digits', 'parity'."
