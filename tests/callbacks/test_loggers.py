"""Loggers: what callbacks log arrives, and is read back from what each logger wrote; nothing leaves the machine."""

import csv
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from lightning_bsr import (
    ActivationMemoryMonitor,
    BlockSelect,
    DigitsDataModule,
    TokenDrop,
    TokenDropVisualizer,
    ViTClassifier,
)

PICTURES = ["memory-by-block", "survivors-val", "scores-val", "classes-val"]
METRICS = {"memory/activations_mib", "memory/rss_mib", "train/loss", "train/accuracy", "val/loss", "val/accuracy"}
STEPS = 2
_BLOCK, _FULL, _LAST = 2**15, 1, 4  # of the files that W&B writes offline


@pytest.fixture
def fit(make_trainer, tmp_path):
    """Fit two steps with all callbacks that log or draw, and return the activations that were measured."""

    def run(logger):
        monitor = ActivationMemoryMonitor()
        visualizer = TokenDropVisualizer(tmp_path / "figures", num_images=2)
        callbacks = [BlockSelect([3]), TokenDrop([1, 2], 0.5), monitor, visualizer]
        options = {"limit_train_batches": STEPS, "limit_val_batches": 1, "log_every_n_steps": 1}
        model = ViTClassifier("test_vit", pretrained=False, model_kwargs={"img_size": 32, "patch_size": 8, "depth": 4})
        make_trainer(*callbacks, logger=logger, **options).fit(model, DigitsDataModule(batch_size=16))
        assert sorted(path.stem for path in visualizer.files) == sorted(PICTURES)
        return monitor.report.activations / 2**20

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_csv__has_all_metrics(fit, tmp_path):
    activations = fit(CSVLogger(tmp_path, name="run", version=0))
    with (tmp_path / "run" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() >= METRICS
    values = {name: [float(row[name]) for row in rows if row[name]] for name in METRICS}
    assert values["memory/activations_mib"] == pytest.approx([activations])
    assert len(values["train/loss"]) == STEPS
    assert len(values["val/accuracy"]) == 1


def test_tensorboard__has_metrics_and_pictures(fit, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    activations = fit(TensorBoardLogger(tmp_path, name="run", version=0))
    events = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    assert [event.value for event in events.Scalars("memory/activations_mib")] == pytest.approx([activations])
    assert [event.step for event in events.Scalars("train/loss")] == [*range(STEPS)]
    assert sorted(events.Tags()["images"]) == sorted(PICTURES)
    for name in PICTURES:
        (event,) = events.Images(name)
        (tmp_path / "back.png").write_bytes(event.encoded_image_string)
        assert np.array_equal(pixels(tmp_path / "back.png"), pixels(tmp_path / "figures" / f"{name}.png"))
        assert event.step == (1 if name == "memory-by-block" else STEPS)


def records_of(path):
    """Read what W&B wrote offline: records in chunks, which say their length and whether more of the record comes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""  # a header of the file comes first
    while place + 7 <= len(data):
        if (room := _BLOCK - place % _BLOCK) < 7:  # no chunk begins in the last bytes of a block
            place += room
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if place + 7 + length > len(data):  # it is being written
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(whole)
            whole = b""


def history_of(path):
    """What a finished run logged, by key."""
    logged = {}
    for record in records_of(path):
        for item in record.history.item:
            logged.setdefault("/".join(item.nested_key), []).append(json.loads(item.value_json))
    return logged


@pytest.mark.slow  # it starts W&B's service
def test_wandb__offline_has_metrics_and_pictures(fit, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    activations = fit(WandbLogger(project="test", save_dir=tmp_path, offline=True))
    wandb.finish()

    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    # The service writes the file in its own time, which a busy machine may not give it at once.
    until = time.monotonic() + 30
    while not (logged := history_of(log)).keys() >= METRICS and time.monotonic() < until:
        time.sleep(0.2)
    assert logged.keys() >= METRICS
    assert logged["memory/activations_mib"] == pytest.approx([activations])
    assert len(logged["train/loss"]) == STEPS
    for name in PICTURES:
        ((path,),) = logged[f"{name}/filenames"]
        assert np.array_equal(pixels(run / "files" / path), pixels(tmp_path / "figures" / f"{name}.png"))


def test_mlflow__in_files_has_metrics_and_pictures(fit, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    # Recent versions want a database or a server instead, which mlflow-skinny has not.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("test", save_dir=str(tmp_path / "mlruns"))
    activations = fit(logger)
    client, run_id = logger.experiment, logger.run_id
    assert client.get_run(run_id).data.metrics.keys() >= METRICS
    measured = client.get_metric_history(run_id, "memory/activations_mib")
    assert [metric.value for metric in measured] == pytest.approx([activations])
    assert len(client.get_metric_history(run_id, "train/loss")) == STEPS
    artifacts = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file:"))
    for name in PICTURES:
        step = 1 if name == "memory-by-block" else STEPS
        path = artifacts / "figures" / f"step-{step}" / f"{name}.png"
        assert np.array_equal(pixels(path), pixels(tmp_path / "figures" / f"{name}.png"))
