"""What can be done to a ViT, with no Trainer: tensor functions first, installers that return a handle second."""

from lightning_bsr.functional._keep_rate import cosine_keep_rate
from lightning_bsr.functional._scores import cls_scores, mean_scores, random_scores
from lightning_bsr.functional._select import BlockSelection, select_blocks_
from lightning_bsr.functional._token_drop import TokenDropHandle, install_token_drop
from lightning_bsr.functional._tokens import drop_tokens, fuse_tokens, num_kept_tokens

__all__ = [
    "BlockSelection",
    "TokenDropHandle",
    "cls_scores",
    "cosine_keep_rate",
    "drop_tokens",
    "fuse_tokens",
    "install_token_drop",
    "mean_scores",
    "num_kept_tokens",
    "random_scores",
    "select_blocks_",
]
