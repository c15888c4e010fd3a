"""A mixture of experts in place of an MLP, with one gate for all tasks or one for each."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp  # type: ignore[attr-defined]  # timm exports it without saying so
from torch import Tensor, nn
from typing_extensions import override

from lightning_bsr._errors import ConfigurationError
from lightning_bsr.functional._experts import dispatch_tokens, experts_in, experts_out
from lightning_bsr.models._routing import capacity_of, choose_experts, importance_loss, limit_experts, load_loss

EXPECTED_MLP = "a plain timm.layers.Mlp: two linear layers (fc1, fc2) and an activation function between them"


class ExpertLinear(nn.Module):
    """The weights of as many linear layers as there are experts, all copies of one at first.

    Attributes:
        weight: ``[E, out, in]``.
        bias: ``[E, out]``, or ``None``.
    """

    def __init__(self, linear: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.weight = _copies(linear.get_parameter("weight"), num_experts)
        self.bias = None if linear.bias is None else _copies(linear.get_parameter("bias"), num_experts)

    @override
    def extra_repr(self) -> str:
        experts, out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, num_experts={experts}, bias={self.bias is not None}"


class MoEMlp(nn.Module):
    """An MLP of which there are several, the experts; each token is sent to those that its gate scores highest.

    The gate is V-MoE's (arXiv 2106.05974): a linear layer, noise while training if asked for, a softmax over all
    experts, and the ``top_k`` highest of it as weights of the experts' outputs. Every expert starts as a copy of
    ``mlp``, so with weights that sum to 1 the module computes what ``mlp`` does until training tells the experts apart.

    Tokens are sorted by expert once, and each expert computes a contiguous slice; no token is computed by an expert
    that it did not choose. Shapes, what backward keeps and the floating-point operations do not depend on the choices.

    State-dict keys: ``fc1.weight`` ``[E, hidden, C]``, ``fc1.bias`` ``[E, hidden]``, ``fc2.weight`` ``[E, C, hidden]``,
    ``fc2.bias`` ``[E, C]``, and ``gates.<i>.weight`` ``[E, C]`` for the i-th task (``gates.0.weight`` for a shared
    gate). How often experts were chosen is counted, but not saved.

    Args:
        mlp: What the experts are copies of.
        num_experts: How many experts there are.
        top_k: How many experts a token is sent to.
        tasks: Names of tasks, or how many there are (named ``"0"``, ``"1"``, ...), for a gate of its own for each;
            ``None`` for one shared gate.
        renormalize: Whether the weights of the chosen experts are scaled to sum to 1. Without, as published, the
            module starts as less than ``mlp``.
        noise_std: Standard deviation of the normal noise on the gate's scores while training; V-MoE has
            ``1 / num_experts``.
        capacity_factor: An expert takes at most this many times its even share of a batch's tokens, first choices
            first; what it does not take adds nothing, so that a token that no expert takes passes through the block's
            residual alone. ``None``: no limit.

    Attributes:
        task: Position of the task whose gate is used; ``None`` before one is chosen.
        use: ``[tasks, E]``: how many tokens each expert took, see :meth:`reset_use`.
        passed: ``[tasks]``: how many tokens no expert took.

    Raises:
        ConfigurationError: An argument is out of range, or ``mlp`` is not a plain :class:`timm.layers.Mlp`.

    Example:
        >>> moe = MoEMlp(Mlp(8, 32), num_experts=4, top_k=2, tasks=["digits", "pets"])
        >>> moe.select_task("pets")
        >>> moe(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> int(moe.use[1].sum())  # 10 tokens, 2 experts each
        20
    """

    use: Tensor
    passed: Tensor

    def __init__(
        self,
        mlp: nn.Module,
        num_experts: int = 16,
        top_k: int = 4,
        *,
        tasks: int | Sequence[str] | None = None,
        renormalize: bool = True,
        noise_std: float = 0.0,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        _check_numbers(num_experts, top_k, noise_std, capacity_factor)
        if (problem := why_not_plain(mlp)) is not None:
            raise ConfigurationError(f"The MLP is {problem}, expected {EXPECTED_MLP}.")
        assert isinstance(mlp, Mlp)
        self.num_experts = num_experts
        self.top_k = top_k
        self.tasks = _task_names(tasks)
        self.renormalize = renormalize
        self.noise_std = noise_std
        self.capacity_factor = capacity_factor
        weight = mlp.fc1.weight
        trains = any(p.requires_grad for p in mlp.parameters())
        gates = [nn.Linear(weight.shape[1], num_experts, bias=False) for _ in self.tasks or ("",)]
        self.gates = nn.ModuleList(gates).to(weight.device, weight.dtype).requires_grad_(trains)
        self.fc1 = ExpertLinear(mlp.fc1, num_experts)
        self.act = mlp.act
        self.drop1 = mlp.drop1
        self.fc2 = ExpertLinear(mlp.fc2, num_experts)
        self.drop2 = mlp.drop2
        self.train(mlp.training)
        self.task: int | None = None if self.tasks else 0
        counts = torch.zeros(len(gates), num_experts, dtype=torch.long, device=weight.device)
        self.register_buffer("use", counts, persistent=False)
        self.register_buffer("passed", torch.zeros_like(counts[:, 0]), persistent=False)
        self._balance: Tensor | None = None

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Compute ``[..., C]`` from tokens ``[..., C]``."""
        logits = self._gate(x).flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        noisy = logits
        if self.training and self.noise_std:
            noisy = logits + self.noise_std * torch.randn_like(logits)
        gates, experts = choose_experts(noisy, self.top_k, renormalize=self.renormalize)
        if self.capacity_factor is not None:
            capacity = capacity_of(len(logits), self.num_experts, self.top_k, self.capacity_factor)
            experts = limit_experts(experts, self.num_experts, capacity)
        dispatch = dispatch_tokens(experts, self.num_experts)
        self._note(logits, noisy, experts, dispatch.ends)

        h = experts_in(x, self.fc1.weight, self.fc1.bias, dispatch)
        h = self.drop1(self.act(h))
        out: torch.Tensor = self.drop2(experts_out(h, gates, self.fc2.weight, self.fc2.bias, dispatch))
        return out.view(x.shape)

    def select_task(self, task: str | int) -> None:
        """Use the gate of a task from now on, by its name or position.

        The choice is an attribute of the module: it is copied and pickled with it. Where this package computes a block
        again in backward, the task of its forward pass is used, whatever was chosen since.

        Raises:
            ConfigurationError: There is no such task.
        """
        if not self.tasks:
            raise ConfigurationError(f"The task is {task!r}, but there is one gate for all tasks; convert with tasks=.")
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(self.tasks):
            self.task = task
        elif task in self.tasks:
            self.task = self.tasks.index(str(task))
        else:
            raise ConfigurationError(f"The task is {task!r}, expected one of {', '.join(map(repr, self.tasks))}.")

    def pop_balance_loss(self) -> Tensor | None:
        """Return how unevenly the last forward pass in train mode used the experts, with its graph, and let go of it.

        With noise it is the mean of V-MoE's importance and load losses, a scalar; without noise, by which the load is
        defined, the importance loss alone. ``None`` if there was no such pass, or the gate does not train.
        """
        balance, self._balance = self._balance, None
        return balance

    def reset_use(self) -> None:
        """Count from zero again."""
        self.use.zero_()
        self.passed.zero_()

    @property
    def changes(self) -> bool:
        """Whether what is computed depends on a task."""
        return bool(self.tasks)

    def as_it_is_now(self) -> contextlib.AbstractContextManager[None]:
        """Give a context in which the task is the present one: what a recomputation needs to repeat this pass."""
        return _Task(self, self.task)

    @override
    def extra_repr(self) -> str:
        tasks = f", tasks={list(self.tasks)}" if self.tasks else ""
        return f"num_experts={self.num_experts}, top_k={self.top_k}{tasks}"

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can be neither copied nor pickled.
        return {**self.__dict__, "_balance": None}

    def _gate(self, x: Tensor) -> Tensor:
        if self.task is None:
            names = ", ".join(map(repr, self.tasks))
            raise ConfigurationError(f"No task is selected, expected one of {names}: call select_task first.")
        logits: Tensor = self.gates[self.task](x)
        return logits

    def _note(self, logits: Tensor, noisy: Tensor, experts: Tensor, ends: Tensor) -> None:
        # In a recomputation, too: backward must find the same tensors saved as in the forward pass.
        balance = None
        if self.training and logits.requires_grad:
            balance = importance_loss(logits)
            if self.noise_std:
                balance = (balance + load_loss(logits, noisy, self.top_k, self.noise_std)) / 2
        if _is_in_backward():
            return
        self._balance = balance
        self.use[self.task] += ends.diff(prepend=ends.new_zeros(1))
        if self.capacity_factor is not None:
            self.passed[self.task] += (experts == self.num_experts).all(-1).sum()


class _Task(contextlib.AbstractContextManager[None]):
    """A context, to be entered as often as backward is run, in which a mixture serves a certain task."""

    def __init__(self, moe: MoEMlp, task: int | None) -> None:
        self._moe = moe
        self._task = task

    def __enter__(self) -> None:
        self._other, self._moe.task = self._moe.task, self._task

    def __exit__(self, *exc_info: object) -> None:
        self._moe.task = self._other


def why_not_plain(mlp: object) -> str | None:
    """Say what a part is if it is not an MLP that can be copied into experts."""
    if not isinstance(mlp, Mlp) or type(mlp).forward is not Mlp.forward:
        return type(mlp).__name__
    for name, kind in (("fc1", nn.Linear), ("fc2", nn.Linear), ("norm", nn.Identity)):
        if type(part := getattr(mlp, name)) is not kind:
            return f"{type(mlp).__name__} with {name}={type(part).__name__}"
    return None


def _check_numbers(num_experts: int, top_k: int, noise_std: float, capacity_factor: float | None) -> None:
    if type(num_experts) is not int or num_experts < 1:
        raise ConfigurationError(f"num_experts is {num_experts!r}, expected a whole number, 1 or above.")
    if type(top_k) is not int or not 1 <= top_k <= num_experts:
        raise ConfigurationError(f"top_k is {top_k!r}, expected a whole number from 1 to num_experts={num_experts}.")
    if noise_std < 0:
        raise ConfigurationError(f"noise_std is {noise_std!r}, expected 0 or more.")
    if capacity_factor is not None and capacity_factor <= 0:
        raise ConfigurationError(f"capacity_factor is {capacity_factor!r}, expected a number above 0, or None.")


def _task_names(tasks: int | Sequence[str] | None) -> tuple[str, ...]:
    names = tuple(map(str, range(tasks))) if type(tasks) is int else tasks
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Sequence) or not names or len({*names}) < len(names):
        raise ConfigurationError(
            f"tasks is {tasks!r}, expected different names, a number of tasks, 1 or above, or None for a shared gate."
        )
    return tuple(names)


def _copies(parameter: nn.Parameter, count: int) -> nn.Parameter:
    copies = parameter.detach().expand(count, *parameter.shape).clone()
    return nn.Parameter(copies, requires_grad=parameter.requires_grad)


def _is_in_backward() -> bool:
    """Whether this pass is a recomputation, by whatever kind of checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
