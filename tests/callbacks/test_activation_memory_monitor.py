import csv
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger

from lightning_bsr import ActivationMemoryMonitor, BlockSelect, ConfigurationError, TokenDrop
from lightning_bsr.functional import install_token_drop, select_blocks_
from lightning_bsr.memory import MIB, measure
from plain_modules import PlainModule, RandomImages, TwoBackwards, tiny_vit


class ProgressBarMetrics(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(dict(trainer.progress_bar_metrics))


def test_monitor__logs_what_measure_measures(make_trainer, images):
    monitor, seen = ActivationMemoryMonitor(), ProgressBarMetrics()
    make_trainer(TokenDrop([1], 0.5), BlockSelect([2]), monitor, seen).fit(PlainModule(), images)
    model = tiny_vit()
    select_blocks_(model, [2])
    install_token_drop(model, [1], 0.5)
    pictures, labels = next(iter(images.train_dataloader()))
    expected = measure(model, pictures, loss=lambda logits: torch.nn.functional.cross_entropy(logits, labels))
    assert monitor.report.activations == expected.activations
    assert monitor.report.by_block == tuple(replace(line, flops=None) for line in expected.by_block)
    assert seen.seen[-1]["memory/activations_mib"] == pytest.approx(expected.activations / MIB)
    assert 50 < seen.seen[-1]["memory/rss_mib"] < psutil.virtual_memory().total / MIB
    assert "memory/peak_mib" not in seen.seen[-1]


def test_monitor__prints_one_table_by_block(make_trainer, images, capsys):
    make_trainer(BlockSelect([2]), ActivationMemoryMonitor(every_n_steps=1), max_epochs=2).fit(PlainModule(), images)
    printed = capsys.readouterr().out
    assert printed.count("Activations kept for backward") == 1
    assert printed.count("frozen") == 6


def test_monitor__measures_every_n_steps_only(make_trainer, images, monkeypatch):
    entered = []
    enter = ActivationMemoryMonitor.__init__.__globals__["ActivationRecorder"].__enter__
    monkeypatch.setattr(
        "lightning_bsr.memory.ActivationRecorder.__enter__", lambda self: entered.append(self) or enter(self)
    )
    make_trainer(ActivationMemoryMonitor(every_n_steps=3), max_epochs=2).fit(PlainModule(), images)
    assert len(entered) == 3  # batches 0, 3 and 6 of 8


def test_monitor__reaches_the_logger_with_units_in_the_keys(make_trainer, images, tmp_path):
    logger = CSVLogger(tmp_path)
    # Four batches an epoch are fewer than Lightning's logging interval.
    make_trainer(ActivationMemoryMonitor(every_n_steps=3), logger=logger, max_epochs=2).fit(PlainModule(), images)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["memory/activations_mib"]]
    assert [int(row["step"]) for row in rows] == [1, 4, 7]
    assert float(rows[0]["memory/activations_mib"]) > 0
    assert float(rows[0]["memory/rss_mib"]) > 0


def test_monitor__does_not_change_training(make_trainer, images):
    with_monitor, without = PlainModule(proj_drop_rate=0.1), PlainModule(proj_drop_rate=0.1)
    for module, callbacks in ((with_monitor, [ActivationMemoryMonitor(every_n_steps=1)]), (without, [])):
        torch.manual_seed(3)
        make_trainer(*callbacks).fit(module, images)
    for a, b in zip(with_monitor.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_monitor__module_without_a_vit(make_trainer, capsys):
    class Linear(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 32 * 32, 4)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monitor = ActivationMemoryMonitor()
    make_trainer(monitor).fit(Linear(), RandomImages().train_dataloader())
    pictures = 4 * 3 * 32 * 32 * 4
    assert pictures < monitor.report.activations < pictures + 1000
    assert "Activations kept" not in capsys.readouterr().out


@pytest.mark.slow
def test_monitor__compiled_model_has_a_total_and_no_table(make_trainer, images, capsys):
    class Compiled(PlainModule):
        def __init__(self):
            super().__init__(depth=3)
            self.model = torch.compile(self.model, backend="aot_eager")

    totals = []
    for module in (Compiled(), PlainModule(depth=3)):
        monitor = ActivationMemoryMonitor()
        # Validation would have everything compiled once more.
        make_trainer(BlockSelect([0, 2]), TokenDrop([1], 0.5), monitor, limit_val_batches=0).fit(module, images)
        totals.append(monitor.report.activations)
    assert totals[0] == pytest.approx(totals[1], rel=0.02)
    assert capsys.readouterr().out.count("Activations kept") == 1


@pytest.mark.parametrize("counts", [(4, 1), (1, 4)])
def test_monitor__several_backward_passes_report_the_largest(counts, make_trainer, images):
    monitor, alone, module = ActivationMemoryMonitor(), ActivationMemoryMonitor(), TwoBackwards()
    module.counts = counts
    make_trainer(monitor).fit(module, images)
    make_trainer(alone).fit(PlainModule(), images)
    assert monitor.report == alone.report


def test_monitor__skipped_batches_leave_no_hooks(make_trainer, images):
    """That autograd's hooks are gone too is looked at after every test, in conftest.py."""

    class Skips(PlainModule):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.global_step < 3 and self.current_epoch < 2 else None

    module = Skips()
    make_trainer(ActivationMemoryMonitor(every_n_steps=1), max_epochs=4).fit(module, images)
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in module.model.blocks)


def test_monitor__blocks_called_by_keyword(make_trainer, images):
    class ByKeyword(PlainModule):
        def training_step(self, batch, batch_idx):
            x = self.model._pos_embed(self.model.patch_embed(batch[0]))
            for block in self.model.blocks:
                x = block(x=x)
            return torch.nn.functional.cross_entropy(self.model.forward_head(self.model.norm(x)), batch[1])

    monitor = ActivationMemoryMonitor()
    make_trainer(BlockSelect([2]), TokenDrop([1], 0.5), monitor, limit_val_batches=0).fit(ByKeyword(), images)
    assert [line.tokens for line in monitor.report.by_block] == [None, 65, 34, 34, 34, 34, 34, None]


def test_monitor__several_vits_say_why_there_is_no_table(make_trainer, images, infos):
    module = PlainModule()
    module.teacher = tiny_vit(depth=2)
    make_trainer(ActivationMemoryMonitor()).fit(module, images)
    assert any(
        message.startswith(
            "ActivationMemoryMonitor: there will be no table by block. PlainModule holds 2 Vision Transformers: 'model'"
        )
        for message in infos
    )


def test_monitor__bad_interval():
    with pytest.raises(ConfigurationError) as error:
        ActivationMemoryMonitor(every_n_steps=0)
    assert str(error.value) == "every_n_steps is 0, expected 1 or more."
