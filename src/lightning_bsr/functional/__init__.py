"""What can be done to a ViT, with no Trainer: tensor functions first, installers that return a handle second."""

from lightning_bsr.functional._attention_backward import attention_gradients, install_attention_by_products
from lightning_bsr.functional._bitfit import BiasSelection, train_biases_
from lightning_bsr.functional._checkpoint import install_checkpointing
from lightning_bsr.functional._delta import LoadedDelta, load_delta, merge_delta, save_delta
from lightning_bsr.functional._delta_file import Delta, read_delta
from lightning_bsr.functional._installed import BlockForwardsHandle
from lightning_bsr.functional._keep_rate import cosine_keep_rate
from lightning_bsr.functional._lean import HalfPolicies, LeanPolicy, install_lean_activations
from lightning_bsr.functional._lora import LoraHandle, install_lora
from lightning_bsr.functional._pack import install_int8_activations, install_sparse_activations
from lightning_bsr.functional._prefix import PrefixCacheHandle, install_prefix_cache
from lightning_bsr.functional._quantize import QuantizedHandle, quantize_frozen_
from lightning_bsr.functional._release import ReleasedGradients, release_gradients_
from lightning_bsr.functional._scores import cls_scores, mean_scores, random_scores
from lightning_bsr.functional._select import BlockSelection, select_blocks_
from lightning_bsr.functional._side import SideNetwork, SideNetworkHandle, install_side_network
from lightning_bsr.functional._survivors import (
    DropWatch,
    SurvivorCounts,
    Survivors,
    find_survivors,
    install_drop_watch,
)
from lightning_bsr.functional._token_drop import TokenDropHandle, install_token_drop
from lightning_bsr.functional._tokens import drop_tokens, fuse_tokens, num_kept_tokens
from lightning_bsr.functional._unread import install_unread_skip

__all__ = [
    "BiasSelection",
    "BlockForwardsHandle",
    "BlockSelection",
    "Delta",
    "DropWatch",
    "HalfPolicies",
    "LeanPolicy",
    "LoadedDelta",
    "LoraHandle",
    "PrefixCacheHandle",
    "QuantizedHandle",
    "ReleasedGradients",
    "SideNetwork",
    "SideNetworkHandle",
    "SurvivorCounts",
    "Survivors",
    "TokenDropHandle",
    "attention_gradients",
    "cls_scores",
    "cosine_keep_rate",
    "drop_tokens",
    "find_survivors",
    "fuse_tokens",
    "install_attention_by_products",
    "install_checkpointing",
    "install_drop_watch",
    "install_int8_activations",
    "install_lean_activations",
    "install_lora",
    "install_prefix_cache",
    "install_side_network",
    "install_sparse_activations",
    "install_token_drop",
    "install_unread_skip",
    "load_delta",
    "mean_scores",
    "merge_delta",
    "num_kept_tokens",
    "quantize_frozen_",
    "random_scores",
    "read_delta",
    "release_gradients_",
    "save_delta",
    "select_blocks_",
    "train_biases_",
]
