"""Parameters of an objective (a learned τ, a bias, a temperature network), in whatever loop trains them.

Gradient: the mean over ranks, taken in the forward pass, so that the parameters stay equal on all ranks whatever wraps
the model, and whether or not the objective is wrapped as well: a mean of equal gradients is that gradient.

Rate: hooks of torch.optim ask the objective for its rate before the optimizer's step, and again after each call of a
closure, which may compute the gradients. A temperature that waits is left out of the step, as if it had no gradient,
and gathers no moments. Where the rate changes over the epochs, the learning rate of its group is scaled for the length
of the step. Schedulers, scalers and saved optimizers therefore see plain groups, and the loop has nothing to remember.

Warnings, once each: parameters that have gradients but never move, because no optimizer that steps holds them or their
learning rate has been 0 from the start; and parameters that share a group with others where that changes τ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from disttempnet import distributed
from disttempnet.errors import UserNotice

STEPS_UNTIL_FORGOTTEN = 10  # optimizer steps in a row that leave the parameters where they are
ParameterGroup = dict[str, Any]
NO_SECOND_GRADIENT = (
    "the losses' gradient is a formula that cannot be differentiated again: call backward without create_graph=True "
    "(gradient penalties and second-order optimizers need another loss)"
)


class Learner(nn.Module):
    """Module that computes the gradient of its own parameters.

    Attributes:
        still: true while all weights stand still and statistics move, as in `train.warm_statistics`: optimizers step
            at rate 0 for their moments, and temperatures of a table stay where they are.
    """

    still = False

    @property
    def own_rate(self) -> float:
        """Learning rate of its parameters; 0 = that of the towers."""
        return 0.0

    def rate_at(self, epoch: float) -> float:
        """Return `own_rate` in that epoch; 0 = the parameters wait."""
        return self.own_rate

    def current_rate(self) -> float:
        """Return `rate_at` the current epoch."""
        return self.own_rate

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return groups for an optimizer: one without weight decay, or none where nothing is learned.

        The group has an `lr` where the temperature has a rate of its own, else the optimizer's default applies. Changes
        of that rate over the epochs happen inside the optimizer's step.

        Example:
            >>> from disttempnet import build_loss
            >>> model = torch.nn.Linear(4, 4)
            >>> loss = build_loss("fastclip-v3", num_samples=100, embed_dim=4)
            >>> groups = [{"params": model.parameters()}, *loss.parameter_groups()]
            >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
            >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            [(0.001, 0.1), (0.0002, 0.0)]
        """
        _watch(self)  # the first forward pass may be inside the first step
        parameters = [p for p in self.parameters() if p.requires_grad]
        group: ParameterGroup = {"params": parameters, "weight_decay": 0.0}
        if self.own_rate:
            group["lr"] = self.own_rate
        return [group] if parameters else []


def with_own_gradient(value: Tensor, term: Tensor, learner: Learner) -> Tensor:
    """Return `value` with the mean over ranks of the term's gradient with respect to the learner's parameters.

    A collective: every rank calls it. The graph of `term` is freed.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    gradients = distributed.all_mean(torch.autograd.grad(term, parameters))
    _watch(learner)
    result = _WithOwnGradient.apply(value, ref(learner), len(parameters), *parameters, *gradients)
    assert isinstance(result, Tensor)
    return result


class _WithOwnGradient(torch.autograd.Function):
    """Identity of a value that adds given gradients of parameters."""

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
    """Record of what optimizer steps did to a learner's parameters."""

    has_gradient: bool = False  # since a step was last counted
    missed: int = 0  # steps in a row that left the parameters where they were
    trained: bool = False  # a step has moved them
    warned_forgotten: bool = False
    warned_shared: bool = False


@dataclass
class _Scaled:
    """Group whose learning rate is scaled for a step; rates are numbers, or tensors."""

    group: ParameterGroup
    plain: Any
    scaled: Any


_watched: WeakKeyDictionary[Learner, _Watch] = WeakKeyDictionary()
_scaled: WeakKeyDictionary[torch.optim.Optimizer, list[_Scaled]] = WeakKeyDictionary()


def _watch(learner: Learner) -> None:
    if learner not in _watched:
        _watched[learner] = _Watch()


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    _restore(optimizer)  # a step that raised has left its rates scaled
    _prepare(optimizer)
    if callable(closure := kwargs.get("closure")):
        return args, {**kwargs, "closure": _prepared_after(closure, optimizer)}
    if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
        return (args[0], _prepared_after(args[1], optimizer), *args[2:]), kwargs
    return None


def _prepared_after(closure: Callable[..., Any], optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    def prepared(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        _prepare(optimizer)
        return result

    return prepared


def _prepare(optimizer: torch.optim.Optimizer) -> None:
    """Take gradients of waiting parameters out of this step and scale the rates of the others. Idempotent."""
    for learner in list(_watched):
        rate = learner.current_rate()
        if rate == learner.own_rate:
            continue
        own, groups = _held(learner, optimizer)
        for group in groups:
            if rate == 0:
                for parameter in group["params"]:
                    if id(parameter) in own:
                        parameter.grad = None
            elif not _is_shared(group, own):
                _scale(optimizer, group, learner.own_rate, rate)


def _held(learner: Learner, optimizer: torch.optim.Optimizer) -> tuple[set[int], list[ParameterGroup]]:
    """Return the learner's parameters, by identity, and the optimizer's groups that hold any of them."""
    own = {id(p) for p in learner.parameters()}
    return own, [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]


def _is_shared(group: ParameterGroup, own: set[int]) -> bool:
    return not all(id(p) in own for p in group["params"])


def _scale(optimizer: torch.optim.Optimizer, group: ParameterGroup, own_rate: float, rate: float) -> None:
    # already scaled in this step, or by an outer optimizer that passed its rate on (ZeroRedundancyOptimizer); identity
    # is compared, because reading a rate on a GPU would make the host wait
    if any(group["lr"] is scaled.scaled for step in _scaled.values() for scaled in step):
        return
    scaled = _Scaled(group, group["lr"], group["lr"] / own_rate * rate)
    _scaled.setdefault(optimizer, []).append(scaled)
    group["lr"] = scaled.scaled


def _restore(optimizer: torch.optim.Optimizer) -> None:
    for scaled in _scaled.pop(optimizer, []):
        scaled.group["lr"] = scaled.plain


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    _restore(optimizer)
    for learner, watch in list(_watched.items()):
        own, groups = _held(learner, optimizer)
        if not watch.warned_shared:
            watch.warned_shared = _warn_if_shared(groups, own, learner.own_rate)
        if not watch.warned_forgotten:
            waits = learner.still or learner.current_rate() == 0 < learner.own_rate
            _count_step(watch, groups, waits)


def _count_step(watch: _Watch, groups: list[ParameterGroup], waits: bool) -> None:
    """Count a step that left the parameters where they were; warn once after several in a row.

    A rate of 0 counts only where it was never another: it may also be the end of a schedule.
    """
    moves = any(not _is_zero(group.get("lr")) for group in groups)
    if moves or (groups and (waits or watch.trained)):
        watch.trained |= not waits
        watch.missed = 0
        watch.has_gradient = False
        return
    watch.missed += watch.has_gradient
    watch.has_gradient = False  # the next optimizer may be the one that holds the parameters
    if watch.missed == STEPS_UNTIL_FORGOTTEN:
        watch.warned_forgotten = True
        why = (
            f"its learning rate was 0 in the last {STEPS_UNTIL_FORGOTTEN} steps"
            if groups
            else f"none of the optimizers that made the last {STEPS_UNTIL_FORGOTTEN} steps holds its parameters"
        )
        _warn(
            f"the loss learns its temperature, but {why}, and τ stays where it is: give an optimizer "
            "*loss.parameter_groups() beside the model's parameters (or loss.requires_grad_(False) to keep τ)"
        )


def _is_zero(rate: Any) -> bool:
    """Return True for a learning rate of 0; one on a GPU is not read, because the host would wait."""
    return not (isinstance(rate, Tensor) and rate.device.type != "cpu") and bool(rate == 0)


def _warn_if_shared(groups: list[ParameterGroup], own: set[int], own_rate: float) -> bool:
    """Warn where a group is shared and its rate or weight decay is not what τ needs; True if warned."""
    for group in groups:
        decay = float(group.get("weight_decay", 0))
        if not _is_shared(group, own) or not (own_rate or decay):
            continue
        if own_rate:
            fault = f"has a learning rate of its own, {own_rate:g} without weight decay, but shares"
            fault += f" a group with other parameters at {group.get('lr')}"
        else:
            fault = f"shares a group with other parameters, whose weight decay of {decay:g} moves τ as well"
        _warn(
            f"the loss's temperature {fault}: give the optimizer *loss.parameter_groups() in place of loss.parameters()"
        )
        return True
    return False


def _warn(message: str) -> None:
    if distributed.is_main():
        warnings.warn(message, UserNotice, stacklevel=2)


# registered at import: the first forward pass may be inside a step's closure, and that step needs the hooks
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
