"""``lightning-bsr visualize``: what it draws, from which weights, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lightning_bsr._visualize_command as command
from lightning_bsr import ViTClassifier
from lightning_bsr.cli import main
from lightning_bsr.memory import MIB

CONFIG = """\
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_val_batches: 2
  callbacks:
    - class_path: BlockSelect
      init_args: {blocks: [3]}
    - class_path: TokenDrop
      init_args: {blocks: [1, 2], keep_rate: 0.5}
    - class_path: ActivationMemoryMonitor
    - class_path: TokenDropVisualizer
model:
  class_path: ViTClassifier
  init_args:
    model_name: test_vit
    pretrained: false
    model_kwargs: {img_size: 32, patch_size: 4, depth: 4}
data:
  class_path: DigitsDataModule
  init_args: {batch_size: 8, num_workers: 0}
"""

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI's args parameter is intended to run from within Python",  # tests do, with pytest's sys.argv
    "ignore:Starting from v1.9.0, `tensorboardX` has been removed",  # the CSV logger is meant
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cfg.yaml").write_text(CONFIG)
    return tmp_path


def visualize(*arguments):
    main(["visualize", "--config=cfg.yaml", *arguments])


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_visualize__draws_the_validation_pictures_and_memory_and_trains_and_writes_nothing_else(
    here, capsys, monkeypatch
):
    monkeypatch.setattr(ViTClassifier, "optimizer_step", lambda *args, **kwargs: pytest.fail("a step was trained"))
    reports = []
    monkeypatch.setattr(
        command, "plot_blocks", lambda report, own=command.plot_blocks: reports.append(report) or own(report)
    )
    visualize("--output=out", "--num-images=3")
    assert names_in("out") == ["classes-val.png", "memory-by-block.png", "scores-val.png", "survivors-val.png"]
    assert names_in(here) == ["cfg.yaml", "out"]
    assert capsys.readouterr().out.splitlines()[-1] == (
        "Written: out/survivors-val.png, out/scores-val.png, out/classes-val.png, out/memory-by-block.png."
    )
    (report,) = reports
    assert [line.name for line in report.by_block if line.trained] == ["3", "head"]
    assert [line.tokens for line in report.by_block] == [65, 65, 34, 19, 19, None]
    assert 0.1 < report.activations / MIB < 10


def test_pictures__of_a_folder_are_drawn_with_the_weights_of_a_checkpoint(here, monkeypatch):
    Path("pictures/deeper").mkdir(parents=True)
    for place, colour in (("a.png", "red"), ("deeper/b.jpg", "blue"), ("deeper/c.png", "lime")):
        Image.new("RGB", (50, 40), colour).save(Path("pictures", place))
    Path("pictures/notes.txt").touch()
    model = ViTClassifier("test_vit", 10, pretrained=False, model_kwargs={"img_size": 32, "patch_size": 4, "depth": 4})
    monkeypatch.setattr(ViTClassifier, "predict_step", lambda *args: pytest.fail("a batch has no labels here"))
    torch.nn.init.zeros_(model.model.blocks[1].attn.qkv.weight)
    torch.nn.init.zeros_(model.model.blocks[1].attn.qkv.bias)
    with torch.no_grad():
        model.model.pos_embed.zero_()
    checkpoint = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}
    torch.save(checkpoint, "trained.ckpt")
    visualize("--output=out", "--pictures=pictures", "--ckpt_path=trained.ckpt", "--num-images=2")
    assert names_in("out") == ["memory-by-block.png", "scores-predict.png", "survivors-predict.png"]
    with Image.open("out/survivors-predict.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    # Of pictures of one colour all scores are equal in these weights, so the first half of the patches is kept.
    red = (np.abs(pixels.astype(int) - [254, 0, 0]) < 3).all(axis=-1)
    columns = red.any(axis=0)
    starts = np.flatnonzero(columns[1:] & ~columns[:-1])
    assert len(starts) == 3  # the picture, after block 1, after block 2
    halves = [red[:, start + 5].sum() for start in starts]
    assert halves[1] == pytest.approx(halves[0] / 2, rel=0.05)
    assert (np.abs(pixels.astype(int) - [0, 0, 254]) < 3).all(axis=-1).any()
    assert not (np.abs(pixels.astype(int) - [0, 255, 0]) < 3).all(axis=-1).any()


def test_pictures__are_found_among_other_files(here, capsys):
    for folder in ("pictures/deeper", "pictures/.hidden", "pictures/folder.png"):
        Path(folder).mkdir(parents=True)
    for place in ("a.png", "deeper/b.JPG", ".hidden/c.png"):
        Image.new("RGB", (50, 40), "red").save(Path("pictures", place), "png")
    for place in ("notes.txt", "._a.png", "deeper/aborted.png"):
        Path("pictures", place).write_text("no picture")
    visualize("--output=out", "--pictures=[pictures,cfg.yaml]")
    assert "survivors-predict.png" in names_in("out")
    assert "Files skipped that are no pictures: 5, such as pictures/._a.png.\n" in capsys.readouterr().out
    Path("pictures/a.png").unlink()
    Path("pictures/deeper/b.JPG").unlink()
    with pytest.raises(SystemExit):
        visualize("--output=none", "--pictures=pictures")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lightning-bsr: error: No file of pictures can be decoded; the first is 'pictures/deeper/aborted.png'."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_images=0"], "num_images is 0, expected 1 or more."),
        (["--output=cfg.yaml"], "output is 'cfg.yaml', which is a file, expected a folder."),
        (
            ["--output=old"],
            "output is 'old', which holds memory-by-block.png already; with --overwrite true files of the same names "
            "are replaced.",
        ),
        (["--pictures=no"], "pictures has 'no', but there is no such file or folder."),
        (
            ["--pictures=[cfg.yaml]"],
            "pictures is ['cfg.yaml'], where no file is a picture; expected files that end in .jpg, .jpeg, .png, .ppm, "
            ".bmp, .pgm, .tif, .tiff, .webp.",
        ),
    ],
)
def test_mistakes__end_in_one_line_before_anything_is_made(arguments, message, here, capsys, monkeypatch):
    monkeypatch.setattr(ViTClassifier, "__init__", lambda self: pytest.fail("the model was made"))
    Path("old").mkdir()
    Path("old/memory-by-block.png").touch()
    with pytest.raises(SystemExit) as stop:
        visualize(*arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lightning-bsr: error: {message}"


def test_no_drop__is_refused(here, capsys):
    Path("cfg.yaml").write_text(
        CONFIG.replace(
            "class_path: TokenDrop\n      init_args: {blocks: [1, 2], keep_rate: 0.5}",
            "class_path: LearningRateMonitor",
        )
    )
    with pytest.raises(SystemExit):
        visualize("--output=out")
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lightning-bsr: error: No picture was drawn: no block drops tokens; add TokenDrop to trainer.callbacks."
    )
