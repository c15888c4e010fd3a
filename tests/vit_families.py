"""Tiny ViTs of timm, torchvision and transformers, and one slow forward for all, with the whole attention matrix."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer

SIZE, PATCH, DEPTH = 32, 8, 4
GRID = SIZE // PATCH
COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": SIZE,
    "patch_size": PATCH,
}


@dataclass
class Family:
    """A model, and what the reference below needs to know of it.

    ``branches`` names the norm, the attention and the scale of the first branch, then norm and scale of the second.
    """

    model: nn.Module
    blocks: Any
    embed: Callable[[torch.Tensor], torch.Tensor]
    finish: Callable[[torch.Tensor], torch.Tensor]
    branches: tuple[str, str, str, str, str]
    prefix: int = 1
    score: str = "cls"
    bias: Callable[[nn.Module], torch.Tensor] = field(default=lambda layer: torch.zeros(()))
    rope: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """What the model gives, as one tensor."""
        out = self.model(images)
        if isinstance(out, torch.Tensor):
            return out
        return out.logits if "logits" in out else out.pooler_output


def _perturbed(model: nn.Module) -> nn.Module:
    """Move every weight, as some start as zeros or ones and would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _torchvision() -> Family:
    model = VisionTransformer(SIZE, PATCH, DEPTH, 3, 48, 96, num_classes=4)

    def embed(images):
        x = torch.cat([model.class_token.expand(len(images), -1, -1), model._process_input(images)], dim=1)
        return x + model.encoder.pos_embedding

    return Family(
        model,
        model.encoder.layers,
        embed,
        lambda x: model.heads(model.encoder.ln(x)[:, 0]),
        ("ln_1", "self_attention", "", "ln_2", ""),
    )


def _timm() -> Family:
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=48, depth=DEPTH, num_heads=3, num_classes=4, reg_tokens=2
    )

    def embed(images):
        return model._pos_embed(model.patch_embed(images))

    def finish(x):
        return model.forward_head(model.norm(x))

    return Family(model, model.blocks, embed, finish, ("norm1", "attn", "", "norm2", ""), prefix=3)


_VIT = ("layernorm_before", "attention", "", "layernorm_after", "")
_DINO = ("norm1", "attention", "layer_scale1", "norm2", "layer_scale2")
_CLIP = ("layer_norm1", "self_attn", "", "layer_norm2", "")


def _vit(name: str, attribute: str, head: str = "ForImageClassification", **options: Any) -> Callable[[], Family]:
    def build():
        import transformers

        config = getattr(transformers, f"{name}Config")(**COMMON, num_labels=4)
        model = getattr(transformers, name + head)(config)
        vit = getattr(model, attribute)
        return Family(model, vit.layers, vit.embeddings, lambda x: finish(model, vit.layernorm(x)), _VIT, **options)

    def finish(model, x):
        if hasattr(model, "classifier"):
            return model.classifier(x[:, 0])
        return (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2

    return build


def _dinov2(name: str, attribute: str, prefix: int) -> Callable[[], Family]:
    def build():
        import transformers

        config = getattr(transformers, f"{name}Config")(**COMMON, num_labels=4)
        model = getattr(transformers, f"{name}ForImageClassification")(config)
        vit = getattr(model, attribute)

        def finish(x):
            x = vit.layernorm(x)
            return model.classifier(torch.cat([x[:, 0], x[:, prefix:].mean(dim=1)], dim=1))

        return Family(model, vit.encoder.layer, vit.embeddings, finish, _DINO, prefix)

    return build


def _dinov3() -> Family:
    import transformers

    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**COMMON, num_register_tokens=2))
    images = torch.zeros(1, 3, SIZE, SIZE)
    return Family(
        model,
        model.model.layer,
        model.embeddings,
        lambda x: model.norm(x)[:, 0],
        _DINO,
        prefix=3,
        rope=lambda: model.rope_embeddings(images),
    )


def _beit(pooled: bool, shared: bool) -> Callable[[], Family]:
    def build():
        import transformers

        config = transformers.BeitConfig(
            **COMMON,
            num_labels=4,
            use_mean_pooling=pooled,
            use_relative_position_bias=not shared,
            use_shared_relative_position_bias=shared,
            layer_scale_init_value=0.5,
        )
        model = transformers.BeitForImageClassification(config)
        vit = model.beit

        def finish(x):
            return model.classifier(vit.pooler(vit.layernorm(x)))

        def bias(layer):
            return (vit.shared_position_bias if shared else layer.relative_position_bias)((GRID, GRID))[0]

        names = ("layernorm_before", "attention", "lambda_1", "layernorm_after", "lambda_2")
        return Family(model, vit.layers, vit.embeddings, finish, names, bias=bias)

    return build


def _clip() -> Family:
    import transformers

    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**COMMON))
    return Family(
        model,
        model.encoder.layers,
        lambda images: model.pre_layrnorm(model.embeddings(images)),
        lambda x: model.post_layernorm(x[:, 0]),
        _CLIP,
    )


def _siglip() -> Family:
    import transformers

    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**COMMON))

    def finish(x):
        return model.head(model.post_layernorm(x))

    return Family(model, model.encoder.layers, model.embeddings, finish, _CLIP, prefix=0, score="mean")


class _OfPictures(nn.Module):
    """Cuts images into the patches that SigLIP 2 wants to be given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def patches(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        cut = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 4, 5, 1)
        return {
            "pixel_values": cut.flatten(3).flatten(1, 2),
            "spatial_shapes": torch.tensor([[GRID, GRID]] * len(images)),
        }

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(pixel_attention_mask=None, **self.patches(images))


def _siglip2() -> Family:
    import transformers

    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**COMMON, num_patches=GRID**2))
    pictures = _OfPictures(model)
    return Family(
        pictures,
        model.encoder.layers,
        lambda images: model.embeddings(**pictures.patches(images)),
        lambda x: model.head(model.post_layernorm(x)),
        _CLIP,
        prefix=0,
        score="mean",
    )


FAMILIES: dict[str, Callable[[], Family]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "vit": _vit("ViT", "vit"),
    "deit": _vit("DeiT", "deit", "ForImageClassificationWithTeacher", prefix=2),
    "vit_msn": _vit("ViTMSN", "vit"),
    "dinov2": _dinov2("Dinov2", "dinov2", 1),
    "dinov2_with_registers": _dinov2("Dinov2WithRegisters", "dinov2_with_registers", 5),
    "dinov3": _dinov3,
    "beit": _beit(pooled=True, shared=False),
    "beit_shared_bias": _beit(pooled=False, shared=True),
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
}


def family(name: str) -> Family:
    torch.manual_seed(0)
    made = FAMILIES[name]()
    _perturbed(made.model)
    return made


def reference(
    made: Family, images: torch.Tensor, rates: dict[int, float], *, fuse: bool = True, restore: bool = False
) -> torch.Tensor:
    """The model's output when blocks drop tokens, image by image, with the attention matrix written out."""
    outputs = []
    for image in made.embed(images):
        x, places = image, list(range(len(image)))  # the place of a fused token is None
        gone: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(made.blocks):
            branch, matrix = _attend(made, layer, x, places)
            x = x + branch
            num_kept = -int(-rates.get(index, 1.0) * (len(x) - made.prefix) // 1)
            if num_kept < len(x) - made.prefix:
                x, places = _drop(made, x, matrix, places, num_kept, fuse, gone)
            x = x + _mlp(made, layer, x)
        if restore:
            left = {place: token for place, token in zip(places, x, strict=True) if place is not None}
            x = torch.stack([(left | gone)[place] for place in range(len(image))])
        outputs.append(x)
    return made.finish(torch.stack(outputs))


def _drop(
    made: Family,
    x: torch.Tensor,
    matrix: torch.Tensor,
    places: list[int | None],
    num_kept: int,
    fuse: bool,
    gone: dict[int, torch.Tensor],
) -> tuple[torch.Tensor, list[int | None]]:
    mean = matrix.mean(dim=0)
    scores = mean[0] if made.score == "cls" else mean.mean(dim=0).detach()
    ranked = sorted(range(made.prefix, len(x)), key=lambda i: -scores[i].item())
    kept, dropped = [*range(made.prefix), *ranked[:num_kept]], ranked[num_kept:]
    rows = [x[i] for i in kept]
    gone.update({places[i]: x[i] for i in dropped if places[i] is not None})
    places = [places[i] for i in kept]
    if fuse:
        rows.append(sum(scores[i] * x[i] for i in dropped))
        places.append(None)
    return torch.stack(rows), places


def _mlp(made: Family, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _scale(layer, made.branches[4], layer.mlp(getattr(layer, made.branches[3])(x)))


def _scale(layer: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    if not name:
        return x
    scale = getattr(layer, name)
    return x * (scale.lambda1 if isinstance(scale, nn.Module) else scale)


def _attend(
    made: Family, layer: nn.Module, x: torch.Tensor, places: list[int | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    attention = getattr(layer, made.branches[1])
    q, k, v = (t.unflatten(-1, (3, -1)).transpose(0, 1) for t in _qkv(attention, getattr(layer, made.branches[0])(x)))
    if made.rope is not None:
        q, k = (_rotated(t, *made.rope(), places, made.prefix) for t in (q, k))
    matrix = (q @ k.mT * q.shape[-1] ** -0.5 + _bias(made.bias(layer), places)).softmax(dim=-1)
    out = next(getattr(attention, name) for name in ("o_proj", "out_proj", "proj") if hasattr(attention, name))
    return _scale(layer, made.branches[2], out((matrix @ v).transpose(0, 1).flatten(1))), matrix


def _qkv(attention: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if isinstance(attention, nn.MultiheadAttention):
        return (x @ attention.in_proj_weight.mT + attention.in_proj_bias).chunk(3, dim=-1)
    if hasattr(attention, "qkv"):
        return attention.qkv(x).chunk(3, dim=-1)
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def _rotated(
    t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, places: list[int | None], prefix: int
) -> torch.Tensor:
    rows = []
    for row, place in enumerate(places):
        token = t[:, row]
        if place is not None and place >= prefix:
            first, second = token.chunk(2, dim=-1)
            token = token * cos[place - prefix] + torch.cat([-second, first], dim=-1) * sin[place - prefix]
        rows.append(token)
    return torch.stack(rows, dim=1)


def _bias(bias: torch.Tensor, places: list[int | None]) -> torch.Tensor:
    if not bias.ndim:
        return bias
    zero = torch.zeros(len(bias))
    rows = [[zero if None in (i, j) else bias[:, i, j] for j in places] for i in places]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
