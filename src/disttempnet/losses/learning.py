"""An objective's own parameters (a learned τ, a bias, a temperature network) in whatever loop trains them.

Gradient: the mean over ranks, taken in the forward pass, so that the parameters stay equal on all ranks whatever wraps
the model, and whether or not the objective is wrapped as well (a mean of equal gradients is that gradient).

Rate: the optimizer's step asks the objective. A temperature that waits is left out of the step, as if it had no
gradient, and gathers no moments; one whose rate changes over the epochs has the learning rate of its group scaled for
the length of the step. So schedulers, scalers and saved optimizers see plain groups, and a loop that was given
`parameter_groups()` has nothing to remember.

Forgotten: parameters that have gradients and are in none of the optimizers that step are named once.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from disttempnet import distributed
from disttempnet.errors import UserNotice

PATIENCE = 10  # optimizer steps without the parameters until they count as forgotten
NO_SECOND_GRADIENT = (
    "the losses' gradient is a formula that cannot be differentiated again: call backward without create_graph=True "
    "(gradient penalties and second-order optimizers need another loss)"
)


class Learner(nn.Module):
    """A module whose parameters are learned from a gradient that it computes itself."""

    @property
    def own_rate(self) -> float:
        """Learning rate of its own; 0 = that of the towers."""
        return 0.0

    def rate_at(self, epoch: float) -> float:
        """`own_rate` in that epoch; 0 = the parameters wait."""
        return self.own_rate

    def current_rate(self) -> float:
        """`rate_at` this point of training."""
        return self.own_rate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What an optimizer is given of this module: [{"params", "weight_decay": 0, "lr"}], or nothing.

        `lr` stands there for a temperature with a rate of its own, else the optimizer's own default applies. How that
        rate changes over the epochs happens inside the optimizer's step.

            torch.optim.AdamW([{"params": model.parameters()}, *loss.parameter_groups()], lr=1e-3, weight_decay=0.1)
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        group: dict[str, Any] = {"params": parameters, "weight_decay": 0.0}
        if self.own_rate:
            group["lr"] = self.own_rate
        return [group] if parameters else []


def with_own_gradient(value: Tensor, term: Tensor, learner: Learner) -> Tensor:
    """`value`, with the mean over ranks of the term's gradient with respect to the learner's parameters.

    Every rank calls this; it has a collective. The graph of `term` is freed.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    gradients = distributed.all_mean(torch.autograd.grad(term, parameters))
    _watch(learner)
    result = _WithOwnGradient.apply(value, ref(learner), len(parameters), *parameters, *gradients)
    assert isinstance(result, Tensor)
    return result


class _WithOwnGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, learner: ref[Learner], count: int, *tensors: Tensor) -> Tensor:
        ctx.learner = learner
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_gradient()
        gradients = [(upstream * gradient).to(gradient.dtype) for gradient in ctx.saved_tensors]
        if (learner := ctx.learner()) is not None and learner in _watched:
            _watched[learner].has_gradient = True
        return (upstream, None, None, *gradients, *(None for _ in gradients))


def refuse_second_gradient() -> None:
    """Raise RuntimeError in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_GRADIENT)


# ---- in the optimizer's step ----


@dataclass
class _Watch:
    has_gradient: bool = False  # since the last step of any optimizer
    missed: int = 0  # steps of optimizers that did not hold the parameters
    settled: bool = False  # an optimizer holds them, or it was named that none does


_watched: WeakKeyDictionary[Learner, _Watch] = WeakKeyDictionary()
_scaled: WeakKeyDictionary[torch.optim.Optimizer, list[tuple[dict[str, Any], Any]]] = WeakKeyDictionary()
_hooks: list[Any] = []


def _watch(learner: Learner) -> None:
    if learner not in _watched:
        _watched[learner] = _Watch()
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    _after_step(optimizer)  # a step that raised has left its rates scaled
    for learner, watch in list(_watched.items()):
        rate = learner.current_rate()
        if watch.settled and rate == learner.own_rate:
            continue
        own = {id(p) for p in learner.parameters()}
        groups = [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]
        if not watch.settled:
            _look_for(watch, groups)
            _name_mixed(groups, own, learner.own_rate)
        if learner.own_rate:
            _at_own_rate(optimizer, groups, own, learner.own_rate, rate)


def _look_for(watch: _Watch, groups: list[dict[str, Any]]) -> None:
    watch.settled = bool(groups)
    if groups or not watch.has_gradient:
        return
    watch.has_gradient = False  # the next optimizer may be the one that holds the parameters
    watch.missed += 1
    if watch.missed == PATIENCE:
        watch.settled = True
        _say(
            f"the loss learns its temperature, but none of the optimizers that made {PATIENCE} steps holds its "
            "parameters, and τ stays where it started: give one of them *loss.parameter_groups() beside the model's "
            "parameters (or loss.requires_grad_(False) to keep τ)"
        )


def _name_mixed(groups: Sequence[dict[str, Any]], own: set[int], own_rate: float) -> None:
    for group in groups:
        if own_rate and not all(id(p) in own for p in group["params"]):
            _say(
                f"the loss's temperature has a learning rate of its own, {own_rate:g} without weight decay, but shares "
                f"a group with other parameters at {float(group['lr']):g}: give the optimizer *loss.parameter_groups() "
                "in place of loss.parameters()"
            )
            return


def _at_own_rate(
    optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]], own: set[int], own_rate: float, rate: float
) -> None:
    for group in groups:
        if rate == 0:
            for parameter in group["params"]:
                if id(parameter) in own:
                    parameter.grad = None
        elif rate != own_rate and all(id(p) in own for p in group["params"]):
            _scaled.setdefault(optimizer, []).append((group, group["lr"]))
            group["lr"] = group["lr"] / own_rate * rate


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group, rate in _scaled.pop(optimizer, []):
        group["lr"] = rate


def _say(what: str) -> None:
    if distributed.is_main():
        warnings.warn(what, UserNotice, stacklevel=2)
