"""Optimizers that PyTorch lacks: Lion, and Muon combined with AdamW."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from vix.training.param_groups import param_groups_weight_decay
from vix.types import Fraction, NotNegativeFloat, PositiveFloat

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class MuonAdamW(Optimizer):
    """Muon (Jordan et al., 2024) for the matrices of hidden layers, AdamW for all other parameters.

    Muon's update has orthogonal rows or columns; it is scaled to the root mean square of AdamW's (Liu et al., "Muon is Scalable
    for LLM Training", 2025), so both have one learning rate and one weight decay. ``torch.optim`` computes both updates. The
    filters of a convolution are one matrix with a row per output channel, unless the convolution is grouped.

    params: groups of :meth:`param_groups_of`; those with ``muon=True`` contain weights of linear layers and convolutions only.
    lr: learning rate.   weight_decay: decoupled weight decay.
    momentum, nesterov, ns_steps: Muon's momentum, and number of its Newton–Schulz iterations.
    betas: AdamW's.
    eps: AdamW's, and the least norm by which Muon divides the momentum of a matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: PositiveFloat = 1e-3,
        *,
        weight_decay: NotNegativeFloat = 0.1,
        momentum: Fraction = 0.95,
        nesterov: bool = True,
        ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5,  # torch.optim.Muon refuses more, in its first step
        betas: tuple[Fraction, Fraction] = (0.9, 0.95),
        eps: PositiveFloat = 1e-8,
    ) -> None:
        shared = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": "match_rms_adamw"}
        super().__init__(params, {**shared, **muon, "betas": betas, "muon": False})
        self.link()

    @staticmethod
    def param_groups_of(model: nn.Module, no_decay: bool) -> list[dict[str, Any]]:
        """The parameters of a model in groups: the weights of its hidden linear layers and convolutions, then the others.

        Not hidden are the first convolution, whose input are images, and the head; grouped convolutions have no matrix.

        no_decay: exclude the parameters of :func:`param_groups_weight_decay` from weight decay.
        """
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and name != "head"]
        matrices = {id(m.weight) for m in layers if m is not first and getattr(m, "groups", 1) == 1}
        groups = param_groups_weight_decay(model)
        if not no_decay:
            groups = [{"params": [p for group in groups for p in group["params"]]}]
        hidden, *undecayed = [{**g, "params": [p for p in g["params"] if id(p) in matrices], "muon": True} for g in groups]
        others = [{**g, "params": [p for p in g["params"] if id(p) not in matrices]} for g in groups]
        # Last, and only where a module's ``no_weight_decay`` names a matrix: checkpoints contain the groups in this order.
        return [hidden, *others, *(group for group in undecayed if group["params"])]

    def link(self) -> None:
        """Give the groups, and the one state of all parameters, to the optimizers that update them."""
        self.parts: list[Optimizer] = []
        for kind, is_muon in ((Muon, True), (AdamW, False)):
            groups = [group for group in self.param_groups if group["muon"] == is_muon and group["params"]]
            if groups:
                with self.filters_as_matrices():
                    part = kind(groups)  # adds its defaults for the options that the groups lack
                part.state = self.state
                self.parts.append(part)

    @contextmanager
    def filters_as_matrices(self) -> Iterator[None]:
        """Give Muon's weights of convolutions two dimensions, in the same memory: it takes nothing else."""
        filters = [p for group in self.param_groups if group["muon"] for p in group["params"] if p.ndim > 2]
        before = [(p.data, p.grad) for p in filters]
        for p, (data, grad) in zip(filters, before, strict=True):
            p.grad = None
            p.data = data.view(len(data), -1)
            p.grad = None if grad is None else grad.reshape(len(grad), -1)
        try:
            yield
        finally:
            for p, (data, grad) in zip(filters, before, strict=True):
                p.grad = None
                p.data, p.grad = data, grad

    def __setstate__(self, state: dict[str, Any]) -> None:  # also by load_state_dict, which replaces groups and state
        super().__setstate__(state)
        self.link()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        with self.filters_as_matrices():
            for part in self.parts:
                part.step()
        return loss


class Lion(Optimizer):
    """Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023. The update is the sign of a momentum.

    lr: learning rate; about a tenth to a third of AdamW's.
    betas: decay of the momentum in the update, and from step to step.
    weight_decay: decoupled weight decay; about three to ten times AdamW's.
    """

    def __init__(
        self,
        params: Params,
        lr: PositiveFloat = 1e-4,
        *,
        betas: tuple[Fraction, Fraction] = (0.9, 0.99),
        weight_decay: NotNegativeFloat = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [p.grad for p in params]
            momenta = [self.momentum_of(p) for p in params]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
        return loss

    def momentum_of(self, p: Tensor) -> Tensor:
        """The momentum of a parameter, which starts at 0."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]
