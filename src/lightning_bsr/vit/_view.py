"""A ViT as the rest of the package sees it: its blocks, its prefix tokens, what comes after the blocks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.vit._owners import Places, draws_positions, num_patch_tokens, patch_size_of, width_of
from lightning_bsr.vit._spec import BlockSpec


@dataclass(frozen=True, eq=False)
class ViTView:
    """One Vision Transformer inside a module.

    Attributes:
        model: The ViT with its head.
        path: Its dotted path inside the module that was searched; empty for that module itself.
        trunk: The ViT without a head that another class puts on it: what holds the embedding of the patches and the
            blocks; often ``model`` itself.
        blocks_path: Dotted path of the list of blocks.
        blocks: The transformer blocks, in order.
        specs: What each block is made of.
        num_prefix_tokens: How many tokens come before the patch tokens (class, distillation, registers).
        has_class_token: Whether the first prefix token is a class token.
        norms: Normalisation layers after the blocks.
        heads: Everything else with parameters after the blocks: classifiers and attention pooling.
        parts: What ``model`` consists of: the list of blocks, and what stands beside it or beside what holds it.
        reads_prefix_alone: Whether ``model`` is known to give nothing but what it makes of the prefix tokens.
        places: What in or around ``model`` is known to look for each patch token in its place.
        keeps_tokens: Why tokens cannot be dropped, as the end of a sentence about the blocks; empty where they can.

    Example:
        >>> import timm
        >>> from lightning_bsr.vit import find_vit
        >>> view = find_vit(timm.create_model("test_vit", num_classes=10))
        >>> len(view.blocks), view.num_prefix_tokens, view.has_class_token
        (6, 1, True)
    """

    model: nn.Module
    path: str
    trunk: nn.Module
    blocks_path: str
    blocks: tuple[nn.Module, ...]
    specs: tuple[BlockSpec, ...]
    num_prefix_tokens: int
    has_class_token: bool
    norms: tuple[nn.Module, ...]
    heads: tuple[nn.Module, ...]
    parts: tuple[nn.Module, ...]
    reads_prefix_alone: bool
    places: Places | None
    keeps_tokens: str = ""

    @property
    def name(self) -> str:
        """The ViT as messages call it, such as ``ViT 'model' (VisionTransformer)``."""
        where = f"ViT {self.path!r}" if self.path else "ViT"
        return f"{where} ({type(self.model).__name__})"

    def check_drops_tokens(self) -> None:
        """Check that tokens can be dropped.

        Raises:
            ConfigurationError: If they cannot; the message says why.
        """
        if self.keeps_tokens:
            kind = type(self.blocks[0]).__name__
            raise ConfigurationError(f"The {self.name} drops no tokens: its blocks ({kind}) {self.keeps_tokens}.")

    @property
    def num_patch_tokens(self) -> int | None:
        """The number of patch tokens at the model's own image size, or ``None`` where the model does not say."""
        return num_patch_tokens(self.trunk)

    @property
    def width(self) -> int | None:
        """How many channels a token has, or ``None`` where the model does not say."""
        return width_of(self.trunk)

    @property
    def draws_positions(self) -> str | None:
        """The part that shifts or scales positions at random in the mode that it is in, or ``None``."""
        return draws_positions(self.trunk)

    def patch_grid(self, num_patches: int, height: int, width: int) -> tuple[int, int]:
        """Say in how many rows and columns the patches of an image lie.

        Args:
            num_patches: How many there are.
            height: Height of the image in pixels.
            width: Its width.

        Raises:
            ConfigurationError: If no grid of so many patches has the shape of the image.

        Example:
            >>> import timm
            >>> from lightning_bsr.vit import find_vit
            >>> find_vit(timm.create_model("test_vit")).patch_grid(50, 80, 160)
            (5, 10)
        """
        if size := patch_size_of(self.trunk):
            rows, columns = math.ceil(height / size[0]), math.ceil(width / size[1])
            if rows * columns == num_patches:
                return rows, columns

        # Patches that a stem of convolutions makes, or of an image that the module has resized, are about square.
        def stretch(rows: int) -> float:
            return abs(math.log(rows / (num_patches // rows) * width / height))

        rows = min((rows for rows in range(1, num_patches + 1) if num_patches % rows == 0), key=stretch)
        if stretch(rows) > math.log(1.5):
            raise ConfigurationError(
                f"The {self.name} makes {num_patches} patches of an image of {height} x {width} pixels, which fill no "
                "grid of that shape."
            )
        return rows, num_patches // rows

    def block_indices(self, blocks: Iterable[int], argument: str = "blocks") -> list[int]:
        """Turn block numbers, which may be negative, into sorted positions.

        Args:
            blocks: Zero-based positions; negative ones count from the last block.
            argument: The name of the user's argument, for messages.

        Raises:
            ConfigurationError: If a number is not an integer, is out of range, or names a block twice.
        """
        depth = len(self.blocks)
        valid = f"the {self.name} has {depth} blocks, numbered 0 to {depth - 1} or -{depth} to -1"
        indices: list[int] = []
        for index in blocks:
            if isinstance(index, bool) or not isinstance(index, Integral):
                raise ConfigurationError(f"{argument} has {index!r}, expected whole numbers: {valid}.")
            if not -depth <= index < depth:
                raise ConfigurationError(f"{argument} has {index}, but {valid}.")
            indices.append(int(index) % depth)
        repeated = sorted({index for index in indices if indices.count(index) > 1})
        if repeated:
            raise ConfigurationError(f"{argument} names block {repeated[0]} more than once: {list(blocks)}.")
        return sorted(indices)
