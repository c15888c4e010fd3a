"""All of MLflow, which writes to a database; test_loggers.py has mlflow-skinny and its plain files."""

import pytest

from lightning_bsr.cli import main

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("default"),  # it warns of many things, none of them ours
]
pytest.importorskip("alembic", reason="needs the package mlflow")
mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow")


def test_fit__logs_metrics_pictures_and_configuration_to_a_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = [f"--trainer.limit_{part}_batches=1" for part in ("train", "val")]
    drop = ["--trainer.callbacks+=TokenDrop", "--trainer.callbacks.blocks=[3]", "--trainer.callbacks.keep_rate=0.5"]
    more = [f"--trainer.callbacks+={name}" for name in ("ActivationMemoryMonitor", "TokenDropVisualizer")]
    logger = ["--trainer.logger=MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///mlflow.db"]
    main(["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", *limits, *drop, *more, *logger])
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs(["1"])
    assert {"memory/activations_mib", "val/loss", "val/accuracy"} <= {*run.data.metrics}
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml", "figures"]
    folder = tmp_path / "1" / run.info.run_id
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "classes-val.png",
        "config.yaml",
        "memory-by-block.png",
        "scores-val.png",
        "survivors-val.png",
    ]
