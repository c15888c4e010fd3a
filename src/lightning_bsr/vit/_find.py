"""Finds the Vision Transformer inside any module, by its structure and never by an attribute's name."""

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from textwrap import TextWrapper

from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.vit._blocks import registered_blocks, spec_of
from lightning_bsr.vit._owners import (
    Places,
    path_to_vit,
    places_read_by,
    prefix_of,
    reads_prefix_alone,
    vit_row,
)
from lightning_bsr.vit._view import ViTView

_CONTAINERS = (nn.ModuleList, nn.Sequential)


def find_vit(module: nn.Module, path: str | None = None) -> ViTView:
    """Find the one Vision Transformer in ``module``.

    A ViT is a module with a list of blocks, all of registered classes, and an integer ``num_prefix_tokens``; or one
    that has timm's ``forward_features`` and blocks of registered classes anywhere inside, such as those of the stages
    of a hierarchical model, which drop no tokens; or one of the known classes of torchvision and transformers, with the
    classifier that another known class puts on it. The text tower beside a vision tower is none.

    Args:
        module: Any module; a LightningModule, a compiled or wrapped model, or the ViT itself.
        path: Dotted path of the ViT, of its list of blocks, or of a module that holds just one ViT; needed when
            ``module`` holds several.

    Returns:
        A view of the ViT.

    Raises:
        ConfigurationError: If there is no ViT, if there are several and ``path`` does not single one out, or if
            ``path`` names no module. The message lists what was found.

    Example:
        >>> import timm
        >>> from torch import nn
        >>> module = nn.ModuleDict({"student": timm.create_model("test_vit"), "teacher": timm.create_model("test_vit")})
        >>> find_vit(module, "student").name
        "ViT 'student' (VisionTransformer)"
    """
    views = list(iter_vits(module))
    if path is not None:
        views = _below(module, path, views)
    if len(views) == 1:
        return views[0]
    if views:
        raise ConfigurationError(
            f"{_title(module, path)} holds {len(views)} Vision Transformers: {_listing(views)}; name one of them "
            f"with vit=, such as vit={_paths(views)[0]!r}."
        )
    raise ConfigurationError(_nothing_found(module, path))


def iter_vits(module: nn.Module) -> Iterator[ViTView]:
    """Yield a view of each Vision Transformer in ``module``."""
    found = [*_known(module), *(view for path, owner in module.named_modules() for view in _plain(module, path, owner))]
    seen = {part for view in found for block in view.blocks for part in block.modules()}
    staged = [view for path, owner in module.named_modules() if (view := _staged(module, path, owner, seen))]
    yield from found
    for view in staged:
        inside = set(view.model.modules()) - {view.model}
        if not any(other.model in inside for other in staged):
            yield view


def _known(module: nn.Module) -> Iterator[ViTView]:
    """Yield the ViTs of classes that are known by name."""
    under_heads: set[nn.Module] = set()
    for path, model in module.named_modules():
        inside = path_to_vit(model)
        if inside is None or model in under_heads:
            continue
        trunk = model.get_submodule(inside)
        under_heads.add(trunk)
        row = vit_row(trunk)
        assert row is not None
        blocks_path = f"{inside}.{row.blocks}" if inside else row.blocks
        container = model.get_submodule(blocks_path)
        if _is_supported(container):
            before, after = _beside(model, blocks_path)
            blocks = list(container.children())
            yield _view(module, path, model, blocks_path, blocks, (*before, container, *after), after, trunk)


def _plain(module: nn.Module, path: str, owner: nn.Module) -> Iterator[ViTView]:
    """Yield the ViTs that have one list of blocks in ``owner``."""
    for name, container in owner.named_children():
        if _is_supported(container) and isinstance(getattr(owner, "num_prefix_tokens", None), int):
            _, after = _beside(owner, name)
            yield _view(module, path, owner, name, list(container.children()), tuple(owner.children()), after, owner)


def _staged(module: nn.Module, path: str, owner: nn.Module, seen: Set[nn.Module]) -> ViTView | None:
    """Find the ViT whose blocks lie anywhere in ``owner``, which has timm's ``forward_features``."""
    if not hasattr(owner, "forward_features"):
        return None
    found = [module for module in owner.modules() if module not in seen and spec_of(module)]
    inside = {child for block in found for child in block.modules() if child is not block}
    blocks = [block for block in found if block not in inside]
    holders = [name for name, child in owner.named_children() if not set(blocks).isdisjoint(child.modules())]
    if not blocks:
        return None
    _, after = _beside(owner, holders[-1])
    view = _view(module, path, owner, holders[0], blocks, tuple(owner.children()), after, owner)
    if view.keeps_tokens:
        return view
    if any(_is_supported(module) and set(module.children()) == set(blocks) for module in owner.modules()):
        return None
    return replace(view, keeps_tokens="lie in several stages, between which patches are laid out as an image")


def _view(
    module: nn.Module,
    path: str,
    model: nn.Module,
    blocks_path: str,
    blocks: Sequence[nn.Module],
    parts: Sequence[nn.Module],
    after: Sequence[nn.Module],
    trunk: nn.Module,
) -> ViTView:
    """Describe the ViT ``model`` at ``path`` of ``module``; ``after`` are those of its parts that follow the blocks."""
    after = [part for part in after if any(True for _ in part.parameters())]
    specs = tuple(spec for spec in map(spec_of, blocks) if spec)
    prefix, has_class_token = prefix_of(trunk)
    return ViTView(
        model=model,
        path=path,
        trunk=trunk,
        blocks_path=f"{path}.{blocks_path}" if path else blocks_path,
        blocks=tuple(blocks),
        specs=specs,
        num_prefix_tokens=prefix,
        has_class_token=has_class_token,
        norms=tuple(part for part in after if _is_norm(part)),
        heads=tuple(part for part in after if not _is_norm(part)),
        parts=tuple(parts),
        reads_prefix_alone=has_class_token and reads_prefix_alone(model),
        places=_places(module, path, trunk, len(blocks)),
        keeps_tokens=next((spec.keeps_tokens for spec in specs if spec.keeps_tokens), ""),
    )


def _beside(model: nn.Module, path: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """What stands before and after the module at ``path``, on each level on the way to it."""
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    for name in path.split("."):
        children = list(model.named_children())
        position = [child for child, _ in children].index(name)
        before += [child for _, child in children[:position]]
        after = [child for _, child in children[position + 1 :]] + after
        model = model.get_submodule(name)
    return before, after


def _places(module: nn.Module, path: str, trunk: nn.Module, depth: int) -> Places | None:
    """What in ``trunk``, or in ``module`` on the way to ``path``, needs each patch token in its place."""
    names = path.split(".") if path else []
    around = [module.get_submodule(".".join(names[:length])) for length in range(len(names), -1, -1)]
    return next((found for part in (trunk, *around) if (found := places_read_by(part, depth))), None)


def _below(module: nn.Module, path: str, views: list[ViTView]) -> list[ViTView]:
    names = dict(module.named_modules(remove_duplicate=False))
    if path not in names:
        found = _listing(views) or "none"
        raise ConfigurationError(
            f"vit={path!r} names no module of {type(module).__name__}; Vision Transformers found: {found}."
        )
    inside = set(names[path].modules())
    return [view for view in views if not inside.isdisjoint((view.model, view.trunk, names[view.blocks_path]))]


def _is_supported(container: nn.Module) -> bool:
    blocks = list(container.children())
    return isinstance(container, _CONTAINERS) and bool(blocks) and all(spec_of(block) for block in blocks)


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Norm" in name and "Head" not in name


def _title(module: nn.Module, path: str | None) -> str:
    return f"{path!r} in {type(module).__name__}" if path else type(module).__name__


def _listing(views: list[ViTView]) -> str:
    return ", ".join(
        f"{path!r} ({type(view.model).__name__}, {len(view.blocks)} blocks)"
        for path, view in zip(_paths(views), views, strict=True)
    )


def _paths(views: list[ViTView]) -> list[str]:
    """The shortest path that names each ViT: its own, or that of its blocks where its owner has several lists."""
    paths = [view.path for view in views]
    return [view.blocks_path if paths.count(view.path) > 1 else view.path for view in views]


def _nothing_found(module: nn.Module, path: str | None) -> str:
    root = module.get_submodule(path) if path else module
    unsupported, no_prefix = [], []
    for name, owner in root.named_modules():
        for child_name, container in owner.named_children():
            where = ".".join(part for part in (path, name, child_name) if part)
            if _is_supported(container):
                no_prefix.append(f"{where!r} of {type(owner).__name__}")
            elif _looks_like_blocks(container):
                block = next(container.children())
                kind = f"{type(block).__module__}.{type(block).__qualname__}"
                unsupported.append(f"{where!r} ({len(list(container.children()))} x {kind})")
    message = f"No supported Vision Transformer was found in {_title(module, path)}."
    if unsupported:
        message += f" Found blocks that are not registered: {', '.join(unsupported[:4])}."
    if no_prefix:
        message += f" Found blocks whose owner has no integer num_prefix_tokens: {', '.join(no_prefix[:4])}."
    if not unsupported and not no_prefix:
        children = ", ".join(f"{name!r} ({type(child).__name__})" for name, child in root.named_children())
        message += f" Its children are: {children or 'none'}."
    return f"{message}\n{_supported_blocks()}"


def _supported_blocks() -> str:
    """The block classes of the table: a paragraph for each library."""
    by_library = defaultdict(list)
    for full_name in registered_blocks():
        library, _, name = full_name.partition(".")
        by_library[library].append(name.removeprefix("models."))
    paragraphs = [f"{library}: {', '.join(names)}" for library, names in by_library.items()]
    wrapper = TextWrapper(120, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    title = "Supported block classes, to which lightning_bsr.register_block adds others:"
    return "\n".join([title, *map(wrapper.fill, paragraphs)])


def _looks_like_blocks(container: nn.Module) -> bool:
    if not isinstance(container, _CONTAINERS):
        return False
    blocks = list(container.children())
    if len(blocks) < 2 or any(isinstance(block, _CONTAINERS) for block in blocks):
        return False
    return all(any(_is_attention(part) for part in block.modules()) for block in blocks)


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name
