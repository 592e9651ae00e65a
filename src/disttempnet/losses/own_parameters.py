"""An objective's own parameters (a learned τ, a bias, a temperature network) in whatever loop trains them.

Gradient: the mean over ranks, taken in the forward pass, so that the parameters stay equal on all ranks whatever wraps
the model, and whether or not the objective is wrapped as well (a mean of equal gradients is that gradient).

Rate: the optimizer's step asks the objective, and again after each call of a closure, where the gradients may come
from. A temperature that waits is left out of the step, as if it had no gradient, and gathers no moments; one whose rate
changes over the epochs has the learning rate of its group scaled for the length of the step. So schedulers, scalers and
saved optimizers see plain groups, and a loop that was given `parameter_groups()` has nothing to remember.

Forgotten: parameters that have gradients and stay where they are, since no optimizer that steps holds them or since
their learning rate has been 0 from the start, are named once.
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

STEPS_UNTIL_FORGOTTEN = 10  # optimizer steps in a row without the parameters until they count as forgotten
ParameterGroup = dict[str, Any]
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

    def parameter_groups(self) -> list[ParameterGroup]:
        """What an optimizer is given of this module: [{"params", "weight_decay": 0, "lr"}], or nothing.

        `lr` stands there for a temperature with a rate of its own, else the optimizer's own default applies. How that
        rate changes over the epochs happens inside the optimizer's step.

            torch.optim.AdamW([{"params": model.parameters()}, *loss.parameter_groups()], lr=1e-3, weight_decay=0.1)
        """
        _watch(self)  # the first forward pass may be inside the first step
        parameters = [p for p in self.parameters() if p.requires_grad]
        group: ParameterGroup = {"params": parameters, "weight_decay": 0.0}
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
    has_gradient: bool = False  # since a step was last counted
    missed: int = 0  # steps in a row that left the parameters where they were
    trained: bool = False  # a step has moved them
    forgotten: bool = False  # it was said that nothing moves them
    shared: bool = False  # it was said that their group is not theirs alone


@dataclass
class _Scaled:
    group: ParameterGroup
    plain: Any  # learning rates: numbers, or tensors
    given: Any


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
    """Leave what waits out of the step under way and scale the rates of the rest; a second time changes nothing."""
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
    """The learner's parameters, by identity, and the optimizer's groups that hold any of them."""
    own = {id(p) for p in learner.parameters()}
    return own, [group for group in optimizer.param_groups if any(id(p) in own for p in group["params"])]


def _is_shared(group: ParameterGroup, own: set[int]) -> bool:
    return not all(id(p) in own for p in group["params"])


def _scale(optimizer: torch.optim.Optimizer, group: ParameterGroup, own_rate: float, rate: float) -> None:
    # the very object, which is no look at a device: scaled in this step already, or by the step of an optimizer around
    # this one, which has handed its rate on (ZeroRedundancyOptimizer)
    if any(group["lr"] is scaled.given for step in _scaled.values() for scaled in step):
        return
    scaled = _Scaled(group, group["lr"], group["lr"] / own_rate * rate)
    _scaled.setdefault(optimizer, []).append(scaled)
    group["lr"] = scaled.given


def _restore(optimizer: torch.optim.Optimizer) -> None:
    for scaled in _scaled.pop(optimizer, []):
        scaled.group["lr"] = scaled.plain


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    _restore(optimizer)
    for learner, watch in list(_watched.items()):
        own, groups = _held(learner, optimizer)
        if not watch.shared:
            watch.shared = _name_shared(groups, own, learner.own_rate)
        if not watch.forgotten:
            _count(watch, groups, waits=learner.current_rate() == 0 < learner.own_rate)


def _count(watch: _Watch, groups: list[ParameterGroup], waits: bool) -> None:
    """Count a step that left the parameters where they were, and say so once.

    A rate of 0 is a fault only where it has never been another: it may also be the end of a schedule.
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
        watch.forgotten = True
        why = (
            f"its learning rate was 0 in the last {STEPS_UNTIL_FORGOTTEN} steps"
            if groups
            else f"none of the optimizers that made the last {STEPS_UNTIL_FORGOTTEN} steps holds its parameters"
        )
        _say(
            f"the loss learns its temperature, but {why}, and τ stays where it is: give an optimizer "
            "*loss.parameter_groups() beside the model's parameters (or loss.requires_grad_(False) to keep τ)"
        )


def _is_zero(rate: Any) -> bool:
    """Of a learning rate; one on a GPU is not looked at, since the host would wait."""
    return not (isinstance(rate, Tensor) and rate.device.type != "cpu") and bool(rate == 0)


def _name_shared(groups: list[ParameterGroup], own: set[int], own_rate: float) -> bool:
    """Say where the parameters are trained as others are and should not be; whether that was said."""
    for group in groups:
        decay = float(group.get("weight_decay", 0))
        if not _is_shared(group, own) or not (own_rate or decay):
            continue
        if own_rate:
            fault = f"has a learning rate of its own, {own_rate:g} without weight decay, but shares"
            fault += f" a group with other parameters at {group.get('lr')}"
        else:
            fault = f"shares a group with other parameters, whose weight decay of {decay:g} moves τ as well"
        _say(
            f"the loss's temperature {fault}: give the optimizer *loss.parameter_groups() in place of loss.parameters()"
        )
        return True
    return False


def _say(what: str) -> None:
    if distributed.is_main():
        warnings.warn(what, UserNotice, stacklevel=2)


# at import: where the first forward pass is inside a step's closure, that step is one of these already
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
