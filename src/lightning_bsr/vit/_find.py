"""Finds the Vision Transformer inside any module, by its structure and never by an attribute's name."""

from collections.abc import Iterator

from torch import nn

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.vit._blocks import registered_blocks, spec_of
from lightning_bsr.vit._view import ViTView

_CONTAINERS = (nn.ModuleList, nn.Sequential)


def find_vit(module: nn.Module, path: str | None = None) -> ViTView:
    """Find the one Vision Transformer in ``module``.

    A ViT is a module with a list of blocks, all of registered classes, and an integer ``num_prefix_tokens``.

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
    for path, owner in module.named_modules():
        children = list(owner.named_children())
        for position, (name, container) in enumerate(children):
            if not _is_supported(container) or not isinstance(getattr(owner, "num_prefix_tokens", None), int):
                continue
            after = [child for _, child in children[position + 1 :] if any(True for _ in child.parameters())]
            blocks = tuple(container.children())
            yield ViTView(
                model=owner,
                path=path,
                blocks_path=f"{path}.{name}" if path else name,
                blocks=blocks,
                specs=tuple(spec for spec in map(spec_of, blocks) if spec),
                num_prefix_tokens=owner.num_prefix_tokens,
                has_class_token=getattr(owner, "cls_token", None) is not None,
                norms=tuple(child for child in after if _is_norm(child)),
                heads=tuple(child for child in after if not _is_norm(child)),
            )


def _below(module: nn.Module, path: str, views: list[ViTView]) -> list[ViTView]:
    names = dict(module.named_modules(remove_duplicate=False))
    if path not in names:
        found = _listing(views) or "none"
        raise ConfigurationError(
            f"vit={path!r} names no module of {type(module).__name__}; Vision Transformers found: {found}."
        )
    inside = set(names[path].modules())
    return [view for view in views if view.model in inside or view.blocks_path == path]


def _is_supported(container: nn.Module) -> bool:
    blocks = list(container.children())
    return isinstance(container, _CONTAINERS) and bool(blocks) and all(spec_of(block) for block in blocks)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


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
    return message + (
        f" Supported block classes: {', '.join(registered_blocks())}; lightning_bsr.register_block adds another."
    )


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
