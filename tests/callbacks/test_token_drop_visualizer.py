"""TokenDropVisualizer: which pictures it draws, what of them, when, and that training does not notice."""

import builtins

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import lightning_bsr.callbacks.token_drop_visualizer as visualizer_module
from lightning_bsr import (
    ActivationMemoryMonitor,
    BlockSelect,
    ConfigurationError,
    DigitsDataModule,
    MultiTaskClassifier,
    MultiTaskDataModule,
    PrefixCache,
    TokenDrop,
    TokenDropVisualizer,
    ViTClassifier,
)
from lightning_bsr.functional import install_drop_watch, install_token_drop
from lightning_bsr.functional._drop_forward import DROP_OBSERVERS
from plain_modules import ManualOptimization, PlainModule

NO_BATCHES = {"limit_train_batches": 2, "limit_val_batches": 2, "num_sanity_val_steps": 1}


class Labelled(LightningDataModule):
    """Normalised pictures in the order of their classes, as folders of pictures give them."""

    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    class_names = ("cat", "dog", "frog", "ship")

    def __init__(self, labels=(0, 0, 0, 0, 1, 1, 1, 2, 2, 3)):
        super().__init__()
        self.pictures = torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(2))
        images = (self.pictures - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)
        self.data = TensorDataset(images, torch.tensor(labels))

    def loader(self):
        return DataLoader(self.data, batch_size=3)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


@pytest.fixture
def drawn(monkeypatch):
    """What the drawing functions are called with, by their names."""
    calls = {}
    for name in ("draw_survivors", "draw_scores", "draw_classes", "plot_blocks"):
        own = getattr(visualizer_module, name)

        def record(*args, own=own, name=name, **kwargs):
            calls.setdefault(name, []).append((args, kwargs))
            return own(*args, **kwargs)

        monkeypatch.setattr(visualizer_module, name, record)
    return calls


def test_validation__draws_one_picture_of_each_class_as_the_model_saw_it(make_trainer, tmp_path, drawn):
    data, module = Labelled(), PlainModule()
    visualizer = TokenDropVisualizer(tmp_path / "figures", num_images=5)
    make_trainer(TokenDrop([1, 3], 0.5), visualizer).validate(module, data, verbose=False)

    names = ["survivors-val", "scores-val", "classes-val"]
    assert visualizer.files == [tmp_path / "figures" / f"{name}.png" for name in names]
    ((pictures, survivors, grid), options) = drawn["draw_survivors"][0]
    assert options == {"labels": ["cat", "dog", "frog", "ship", "cat"]}
    chosen = [0, 4, 7, 9, 1]
    torch.testing.assert_close(pictures, data.pictures[chosen].permute(0, 2, 3, 1))
    assert grid == (8, 8)

    install_token_drop(module, [1, 3], 0.5)
    watch = install_drop_watch(module)
    module.eval()
    with torch.no_grad():
        module.model(data.data.tensors[0])
    (expected,) = watch.take()
    watch.remove()
    for block in (1, 3):
        assert torch.equal(survivors[block].kept, expected[block].kept[chosen])
        torch.testing.assert_close(survivors[block].scores, expected[block].scores[chosen], equal_nan=True)
    ((counts, _), _) = drawn["draw_classes"][0]
    assert counts.pictures == {"cat": 4, "dog": 3, "frog": 2, "ship": 1}
    torch.testing.assert_close(counts.shares("dog")[3], expected[3].kept[4:7].float().mean(dim=0))


def test_fit__draws_each_validation_but_not_the_sanity_check_and_memory_once(make_trainer, tmp_path, drawn, infos):
    visualizer = TokenDropVisualizer()
    callbacks = [visualizer, BlockSelect([3]), TokenDrop([1, 3], 0.5)]
    trainer = make_trainer(*callbacks, max_epochs=2, **NO_BATCHES)
    trainer.fit(PlainModule(), Labelled())
    assert [len(drawn[name]) for name in ("draw_survivors", "plot_blocks")] == [2, 1]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(path.name for path in visualizer.files)
    ((report,), _) = drawn["plot_blocks"][0]
    assert [line.tokens for line in report.by_block] == [65, 65, 34, 34, 19, 19, 19, None]
    assert [line.name for line in report.by_block if line.trained] == ["3", "head"]
    trainer.test(PlainModule(), Labelled(), verbose=False)
    trainer.predict(PlainModule(), Labelled(), return_predictions=False)
    assert sorted(path.stem for path in visualizer.files) == sorted(
        [
            "memory-by-block",
            *(f"{kind}-{stage}" for kind in ("survivors", "scores", "classes") for stage in ("val", "test", "predict")),
        ]
    )
    assert DROP_OBSERVERS == []


@pytest.mark.parametrize("first", [True, False])
def test_fit__is_the_same_with_it(first, make_trainer, tmp_path):
    def weights(*extra):
        torch.manual_seed(3)
        module, monitor = PlainModule(proj_drop_rate=0.2), ActivationMemoryMonitor()
        callbacks = [BlockSelect([3]), TokenDrop([1, 3], 0.5), monitor]
        callbacks = [*extra, *callbacks] if first else [*callbacks, *extra]
        make_trainer(*callbacks, max_epochs=2, **NO_BATCHES).fit(module, Labelled())
        return torch.cat([p.flatten() for p in module.parameters()]), monitor.report, torch.rand(1)

    without, report, after = weights()
    with_it, report_with_it, after_with_it = weights(TokenDropVisualizer(tmp_path, num_images=1))
    assert torch.equal(without, with_it)
    assert report == report_with_it
    assert torch.equal(after, after_with_it)


def test_fit__with_a_prefix_cache_shows_its_drops_too(make_trainer, tmp_path, drawn):
    cache = PrefixCache()
    callbacks = [BlockSelect([4]), TokenDrop([1, 3], 0.5), cache, TokenDropVisualizer(tmp_path)]
    make_trainer(*callbacks, max_epochs=2, **NO_BATCHES).fit(PlainModule(), Labelled())
    assert [[*args[1]] for args, _ in drawn["draw_survivors"]] == [[1, 3], [1, 3]]


def test_warm_up__draws_nothing_in_an_epoch_in_which_nothing_is_dropped(make_trainer, tmp_path, drawn):
    callbacks = [TokenDropVisualizer(tmp_path), TokenDrop([1, 3], 0.5, warmup_epochs=1)]
    make_trainer(*callbacks, max_epochs=2, **NO_BATCHES).fit(PlainModule(), Labelled())
    assert len(drawn["draw_survivors"]) == 1
    ((report,), _) = drawn["plot_blocks"][0]
    assert [line.tokens for line in report.by_block] == [65] * 7 + [None]


def test_without_a_drop__says_so_and_draws_nothing(make_trainer, tmp_path, infos):
    make_trainer(TokenDropVisualizer(tmp_path / "figures")).validate(PlainModule(), Labelled(), verbose=False)
    assert "TokenDropVisualizer: no block drops tokens, so there is nothing to draw." in infos
    assert not (tmp_path / "figures").exists()


def test_module_that_cannot_be_planned__has_no_picture_of_memory(make_trainer, tmp_path, drawn, infos):
    callbacks = [TokenDrop([1, 3], 0.5), TokenDropVisualizer(tmp_path)]
    make_trainer(*callbacks, **NO_BATCHES).fit(ManualOptimization(), Labelled())
    assert "plot_blocks" not in drawn
    assert len(drawn["draw_survivors"]) == 1
    (said,) = [info for info in infos if info.startswith("TokenDropVisualizer: the memory of a step is not drawn. ")]
    assert "ManualOptimization optimizes by itself" in said


def test_pictures_of_several_tasks__are_named_by_their_own_data(make_trainer, tmp_path, drawn):
    data = MultiTaskDataModule({"digits": DigitsDataModule(batch_size=4), "animals": Labelled()})
    model = MultiTaskClassifier(
        {"digits": 10, "animals": 4},
        model_name="test_vit",
        pretrained=False,
        model_kwargs={"img_size": 32, "patch_size": 8},
    )
    visualizer = TokenDropVisualizer(tmp_path, num_images=20)
    make_trainer(TokenDrop([1], 0.5), visualizer, limit_val_batches=2).validate(model, data, verbose=False)
    labels = drawn["draw_survivors"][0][1]["labels"]
    assert {"cat", "dog"} <= set(labels) <= {"cat", "dog", *map(str, range(10))}


def test_batch_as_a_mapping__and_mean_and_std_that_were_given(make_trainer, tmp_path, drawn):
    class Mapped(PlainModule):
        def validation_step(self, batch, batch_idx):
            self.model(batch["image"])

    class Samples(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return {"label": index, "image": torch.full((3, 32, 32), 0.5)}

        def __len__(self):
            return 2

    visualizer = TokenDropVisualizer(tmp_path, mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    trainer = make_trainer(TokenDrop([1], 0.5), visualizer)
    trainer.validate(Mapped(), DataLoader(Samples(), batch_size=2), verbose=False)
    (pictures, *_), options = drawn["draw_survivors"][0]
    assert options["labels"] == ["0", "1"]
    torch.testing.assert_close(pictures[0, 0, 0], torch.tensor([0.6, 0.7, 0.8]))
    assert [path.name for path in visualizer.files] == ["survivors-val.png", "scores-val.png"]  # all are drawn


def test_normalization__is_looked_for_in_the_model_where_the_data_have_none(make_trainer, tmp_path, drawn):
    model = ViTClassifier("test_vit", num_classes=10, pretrained=False, model_kwargs={"img_size": 32})
    data = DataLoader(TensorDataset(torch.zeros(2, 3, 32, 32), torch.tensor([1, 2])), batch_size=2)
    make_trainer(TokenDrop([1], 0.5), TokenDropVisualizer(tmp_path)).validate(model, data, verbose=False)
    (pictures, *_), _ = drawn["draw_survivors"][0]
    torch.testing.assert_close(pictures[0, 0, 0], torch.tensor(model.model.pretrained_cfg["mean"]))


def test_files__are_of_the_pictures(make_trainer, tmp_path):
    data = Labelled()
    data.data.tensors[0][:] = torch.tensor([2.0, -2.0, -3.0]).view(3, 1, 1)  # 1, 0, 0: red
    make_trainer(TokenDrop([1], 0.5), TokenDropVisualizer(tmp_path)).validate(PlainModule(), data, verbose=False)
    with Image.open(tmp_path / "survivors-val.png") as image:
        red = (np.asarray(image.convert("RGB")) == [255, 0, 0]).all(axis=-1)
    columns = red.any(axis=0)
    (_, second) = np.flatnonzero(columns[1:] & ~columns[:-1])[:2]
    assert red[:, second:].sum() == pytest.approx(red[:, :second].sum() / 2, rel=0.02)


def test_error__leaves_nothing_behind(make_trainer, tmp_path):
    class Fails(PlainModule):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("as asked for")

    with pytest.raises(RuntimeError, match="as asked for"):
        make_trainer(TokenDrop([1], 0.5), TokenDropVisualizer(tmp_path)).validate(Fails(), Labelled(), verbose=False)
    assert DROP_OBSERVERS == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images is 0, expected 1 or more."),
        ({"mean": [0.5]}, "mean is [0.5] and std is None, expected both or neither."),
    ],
)
def test_arguments__are_checked_at_once(options, message):
    with pytest.raises(ConfigurationError) as error:
        TokenDropVisualizer(**options)
    assert str(error.value) == message


def test_matplotlib__is_missed_before_training(make_trainer, monkeypatch):
    found = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    monkeypatch.setattr(PlainModule, "training_step", lambda *args: pytest.fail("it trained"))
    with pytest.raises(ConfigurationError, match="Drawing needs matplotlib, which is not installed"):
        make_trainer(TokenDropVisualizer()).fit(PlainModule(), Labelled())
