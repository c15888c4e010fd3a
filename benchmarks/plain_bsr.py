"""Block Selective Reprogramming written straight into a Vision Transformer: the yardstick for speed and memory.

No hooks, no patching, no options: what somebody would write who needs just this configuration of just this model.
"""

import math

import timm
import torch
import torch.nn.functional as F
from torch import nn


class PlainBSR(nn.Module):
    """A ViT that trains ``train_blocks`` and drops and fuses tokens in ``drop_blocks``.

    Args:
        model: A timm ViT with a class token; its weights are used.
        train_blocks: Blocks that train, besides the last norm and the head.
        drop_blocks: Blocks that drop tokens.
        keep_rate: The share of patch tokens that is kept.
    """

    def __init__(self, model: nn.Module, train_blocks: list[int], drop_blocks: list[int], keep_rate: float) -> None:
        super().__init__()
        self.vit = model
        self.drop_blocks = drop_blocks
        self.keep_rate = keep_rate
        model.requires_grad_(False)
        for part in (model.norm, model.head, *(model.blocks[i] for i in train_blocks)):
            part.requires_grad_(True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify ``images`` ``[B, 3, H, W]``."""
        vit = self.vit
        x = vit.patch_embed(images)
        x = torch.cat([vit.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + vit.pos_embed
        for index, block in enumerate(vit.blocks):
            attn = block.attn
            batch, tokens, width = x.shape
            qkv = attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            out = F.scaled_dot_product_attention(q, k, v)
            x = x + attn.proj(out.transpose(1, 2).reshape(batch, tokens, width))
            if index in self.drop_blocks:
                row = (q[:, :, :1] @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)
                scores = row[:, :, 0, 1:].mean(dim=1)
                kept = math.ceil(self.keep_rate * (tokens - 1))
                order = scores.argsort(dim=1, descending=True)
                sorted_tokens = x[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, width))
                weights = scores.gather(1, order)[:, kept:]
                fused = weights.unsqueeze(1) @ sorted_tokens[:, kept:]
                x = torch.cat([x[:, :1], sorted_tokens[:, :kept], fused], dim=1)
            x = x + block.mlp(block.norm2(x))
        return vit.head(vit.norm(x)[:, 0])


def plain_bsr(model_name: str, num_classes: int, train: list[int], drop: list[int], keep_rate: float) -> PlainBSR:
    """Build a :class:`PlainBSR` around a timm model."""
    return PlainBSR(timm.create_model(model_name, num_classes=num_classes), train, drop, keep_rate)
