"""The ``visualize`` subcommand: pictures of what a configured model drops, and of what its training step keeps."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.callbacks import TokenDropVisualizer
from lightning_bsr.callbacks._conflicts import callbacks_of
from lightning_bsr.callbacks._figures import publish_figure
from lightning_bsr.data._pictures import load_rgb
from lightning_bsr.drawing import plot_blocks
from lightning_bsr.drawing._figure import require_matplotlib
from lightning_bsr.memory import MemoryReport
from lightning_bsr.planning import FitPlanner, FitStep
from lightning_bsr.planning._configuration import quiet_configuration
from lightning_bsr.vit import find_vit


class VisualizeCommand(Trainer):
    """A Trainer with the method that LightningCLI turns into ``lightning-bsr visualize``."""

    def visualize(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        output: str = "figures",
        pictures: list[str] | str | None = None,
        num_images: int = 8,
        overwrite: bool = False,
        vit: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Draw which patches survive each drop, by what scores, where in each class, and what a step keeps by block.

        Args:
            model: The configured module.
            datamodule: The configured data, whose validation pictures are drawn.
            output: Folder for the PNG files.
            pictures: Picture files, or folders of them, to draw instead of the validation pictures.
            num_images: How many pictures to draw; of validation pictures one of each class before a second of any.
            overwrite: Whether files that exist may be replaced.
            vit: Dotted path of the ViT, for when the module holds several.
            ckpt_path: A checkpoint with trained weights; without it the weights are those that fit would start from.
            weights_only: Whether the checkpoint may hold nothing but plain data, as fit has it.
        """
        planner: FitPlanner[MemoryReport | ConfigurationError] = FitPlanner(lambda step: _plan(step, vit))
        visualizer = TokenDropVisualizer(output, num_images=num_images, vit=vit)
        callbacks = callbacks_of(self)
        callbacks.append(planner)
        self.fit(model, datamodule=datamodule)
        callbacks[-1] = visualizer
        loading: dict[str, Any] = {"ckpt_path": ckpt_path, "weights_only": weights_only}
        with warnings.catch_warnings():
            # Those that wrote the checkpoint are left out here on purpose.
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
            if pictures is None:
                self.validate(model, datamodule=datamodule, verbose=False, **loading)
            else:
                files, skipped = _files_of(pictures)
                images, undecodable = _load(files, num_images)
                if skipped := skipped + undecodable:
                    print(f"Files skipped that are no pictures: {len(skipped)}, such as {skipped[0]}.")
                loader = _prepare(images, model, datamodule, vit)
                with _predicting_on_images(model, vit):
                    self.predict(model, loader, return_predictions=False, **loading)
        if not visualizer.files:
            raise ConfigurationError("No picture was drawn: no block drops tokens; add TokenDrop to trainer.callbacks.")
        written = list(visualizer.files)
        if isinstance(planner.result, MemoryReport):
            written.append(publish_figure(self, Path(output), "memory-by-block", plot_blocks(planner.result)))
        else:
            print(f"The memory of a step is not drawn. {planner.result or 'fit would train on no batch.'}")
        print(f"Written: {', '.join(map(str, written))}.")


@contextlib.contextmanager
def visualizing_configuration(cli: LightningCLI) -> Iterator[None]:
    """Check the options of ``visualize``; while the context lasts, ``cli`` makes a Trainer that writes nothing else.

    Args:
        cli: A command line that has parsed its arguments but made nothing yet.

    Raises:
        ConfigurationError: An option is wrong, or matplotlib is not installed.
    """
    options = cli.config[str(cli.subcommand)]
    require_matplotlib()
    if options["num_images"] < 1:
        raise ConfigurationError(f"num_images is {options['num_images']}, expected 1 or more.")
    output = Path(options["output"])
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"output is {options['output']!r}, which is a file, expected a folder.")
    present = sorted(file.name for file in output.glob("*.png"))
    if present and not options["overwrite"]:
        raise ConfigurationError(
            f"output is {options['output']!r}, which holds {present[0]} already; with --overwrite true files of the "
            "same names are replaced."
        )
    if options["pictures"] is not None:
        _files_of(options["pictures"])
    with quiet_configuration(cli, keep_logger=True):
        yield


def _plan(step: FitStep, vit: str | None) -> MemoryReport | ConfigurationError:
    try:
        return step.plan(vit=vit)
    except ConfigurationError as error:
        return error


def _files_of(pictures: Sequence[str] | str) -> tuple[list[Path], list[Path]]:
    """List the files that are named like pictures, and the others, of which hidden ones are."""
    files: list[Path] = []
    others: list[Path] = []
    for name in [pictures] if isinstance(pictures, str) else pictures:
        path = Path(name)
        if not path.exists():
            raise ConfigurationError(f"pictures has {name!r}, but there is no such file or folder.")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                # Below the given folder, which may be hidden itself.
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                (others if hidden or file.suffix.lower() not in IMG_EXTENSIONS else files).append(file)
    if not files:
        raise ConfigurationError(
            f"pictures is {pictures!r}, where no file is a picture; expected files that end in "
            f"{', '.join(IMG_EXTENSIONS)}."
        )
    return files, others


def _load(files: Sequence[Path], num_images: int) -> tuple[list[Image.Image], list[Path]]:
    """Read as many pictures as are wanted, and list the files before the last of them that cannot be decoded."""
    images: list[Image.Image] = []
    undecodable: list[Path] = []
    for file in files:
        if len(images) == num_images:
            break
        try:
            images.append(load_rgb(file))
        except OSError:
            undecodable.append(file)
    if not images:
        raise ConfigurationError(f"No file of pictures can be decoded; the first is '{files[0]}'.")
    return images, undecodable


def _prepare(
    images: Sequence[Image.Image], model: LightningModule, datamodule: LightningDataModule | None, vit: str | None
) -> DataLoader[Any]:
    """Give one batch of pictures as the data module's own, or else the ViT's pretrained_cfg, would have them."""
    own: Mapping[str, Any] = getattr(find_vit(model, vit).model, "pretrained_cfg", None) or {}
    default = {"img_size": own.get("input_size", (3, 224, 224))[1:], "mean": own.get("mean"), "std": own.get("std")}
    size, mean, std = (getattr(datamodule, name, None) or value for name, value in default.items())
    if mean is None or std is None:
        raise ConfigurationError(
            f"Neither the data ({type(datamodule).__name__}) nor the model says by what mean and std pictures are "
            "normalised; leave pictures out, or give the data module mean and std."
        )
    transform = v2.Compose(
        [
            v2.Resize((size, size) if isinstance(size, int) else tuple(size), antialias=True),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
            v2.ToPureTensor(),
        ]
    )
    batch = [transform(image) for image in images]
    return DataLoader(batch, batch_size=len(batch))  # type: ignore[arg-type]  # a list is a dataset


@contextlib.contextmanager
def _predicting_on_images(model: LightningModule, vit: str | None) -> Iterator[None]:
    """While the context lasts, let the module's prediction be what its ViT makes of a batch of images alone."""
    before = vars(model).get("predict_step")
    model.predict_step = lambda images, *_: find_vit(model, vit).model(images)  # type: ignore[method-assign]  # on this instance only
    try:
        yield
    finally:
        if before is None:
            del model.predict_step
        else:
            model.predict_step = before  # type: ignore[method-assign]  # it was the instance's own
