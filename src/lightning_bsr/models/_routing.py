"""How tokens choose experts, and how evenly: functions of tensors, after V-MoE (arXiv 2106.05974)."""

import math

import torch
from torch import Tensor


def choose_experts(logits: Tensor, top_k: int, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Let each token choose the experts of its highest gates, the softmax over all experts.

    Args:
        logits: ``[T, E]``.
        top_k: How many experts a token chooses.
        renormalize: Whether the gates of the chosen experts are scaled to sum to 1. V-MoE leaves them as they are.

    Returns:
        Gates and experts, both ``[T, top_k]``, the highest first.

    Example:
        >>> logits = torch.log(torch.tensor([[0.1, 0.3, 0.6]]))
        >>> choose_experts(logits, 2)
        (tensor([[0.6667, 0.3333]]), tensor([[2, 1]]))
        >>> choose_experts(logits, 2, renormalize=False)[0]
        tensor([[0.6000, 0.3000]])
    """
    gates, experts = logits.softmax(-1).topk(top_k)
    if renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    return gates, experts


def limit_experts(experts: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Take choices away from experts that are full: first choices go first, then by the order of tokens.

    Args:
        experts: ``[T, k]``, the experts that each token chose, the favourite first.
        num_experts: How many experts there are.
        capacity: The most tokens that an expert takes.

    Returns:
        ``[T, k]``, with ``num_experts``, which is no expert, instead of a full one.

    Example:
        >>> limit_experts(torch.tensor([[0, 1], [0, 1], [1, 0]]), num_experts=2, capacity=2)
        tensor([[0, 1],
                [0, 2],
                [1, 2]])
    """
    by_choice = experts.t().flatten()
    chosen, order = by_choice.sort(stable=True)
    begins = torch.searchsorted(chosen, torch.arange(num_experts, device=experts.device))
    place = torch.arange(len(order), device=experts.device) - begins[chosen]
    limited = torch.where(place < capacity, chosen, num_experts)
    return torch.empty_like(by_choice).scatter_(0, order, limited).view(experts.t().shape).t()


def capacity_of(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """The most tokens that an expert takes: ``factor`` times an even share, rounded up.

    Example:
        >>> capacity_of(num_tokens=100, num_experts=16, top_k=4, factor=1.05)
        27
    """
    return math.ceil(factor * num_tokens * top_k / num_experts)


def importance_loss(logits: Tensor) -> Tensor:
    """The squared coefficient of variation of the experts' gates, summed over tokens: V-MoE's importance loss.

    Args:
        logits: ``[T, E]``, without noise.

    Example:
        >>> importance_loss(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor(0.)
    """
    return _squared_variation(logits.softmax(-1).sum(0))


def load_loss(logits: Tensor, noisy_logits: Tensor, top_k: int, noise_std: float) -> Tensor:
    """The squared coefficient of variation of the experts' expected loads: V-MoE's load loss.

    An expert's load is the sum over tokens of the probability that, with its noise drawn anew, it would be among the
    ``top_k``.

    Args:
        logits: ``[T, E]``, without noise.
        noisy_logits: The same with the noise by which experts were chosen.
        top_k: How many experts a token chooses.
        noise_std: Standard deviation of the noise, above 0.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
        >>> load_loss(logits, logits, top_k=1, noise_std=0.5)
        tensor(0.)
    """
    threshold = noisy_logits.topk(top_k).values[:, -1:]
    return _squared_variation(torch.special.ndtr((logits - threshold) / noise_std).sum(0))


def _squared_variation(values: Tensor) -> Tensor:
    return values.var(correction=0) / values.mean() ** 2
