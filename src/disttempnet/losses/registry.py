"""List of objectives: name → formula, source, arguments and how it is built.

To add an objective, add a row to `OBJECTIVES`, and a file if it is no member of the family. Numbers that it alone takes
get a row of `ARGUMENT_RANGES`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from disttempnet.errors import unknown_name
from disttempnet.io.ranges import SEEDS, Range, integers
from disttempnet.losses.global_contrastive import GlobalContrastiveLoss
from disttempnet.losses.minibatch.amorlip import AmorLipLoss
from disttempnet.losses.minibatch.cyclip import CyClipLoss
from disttempnet.losses.minibatch.onlineclr import OnlineClrLoss
from disttempnet.losses.minibatch.siglip import SigLipLoss
from disttempnet.losses.minibatch.vicreg import VicRegLoss
from disttempnet.losses.normaliser.prototypes import PrototypeNormaliser
from disttempnet.losses.objective import Objective, ObjectiveContext
from disttempnet.losses.popularity import Popularity
from disttempnet.losses.sample_state import SampleState
from disttempnet.losses.schedule import ConstantGamma, CosineGamma, Gamma, NoMemory, ScentGamma
from disttempnet.losses.temperature.network import NetworkTemperature
from disttempnet.losses.temperature.scalar import (
    ConstantTemperature,
    LearnableTemperature,
    PerSampleTemperature,
    Temperature,
)


@dataclass(frozen=True)
class ObjectiveSpec:
    """Row of the list.

    Attributes:
        title: written name.
        formula: the minimised function, in the symbols of docs/objectives.md.
        temperature, gamma: kind of temperature and of γ.
        source: paper.
        arguments: its own arguments and their defaults.
        build: function of an ObjectiveContext and the arguments.
        note: remark on the defaults; may be empty.
    """

    title: str
    formula: str
    temperature: str
    gamma: str
    source: str
    arguments: dict[str, Any]
    build: Callable[..., Objective]
    note: str = ""

    def bytes_a_sample(self) -> int:
        """Return the bytes of state a sample in float32, where every rank holds all of it."""
        objective = self.build(ObjectiveContext(num_samples=1, embed_dim=8), **self.arguments)
        return sum(m.bytes_a_sample for m in objective.modules() if isinstance(m, SampleState))


def _own(part: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a part that have defaults: argument → default."""
    parameters = inspect.signature(part).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _family(
    title: str,
    temperature: type[Temperature],
    gamma: type[Gamma] | None,
    source: str,
    /,
    *,
    predicted: type[PrototypeNormaliser] | None = None,
    hinge: bool = False,
    referenced: bool = False,
    popularity: bool = False,
    robust: bool = True,
    note: str = "",
    **defaults: Any,
) -> ObjectiveSpec:
    """Build a row of the family: the estimator × a temperature × a schedule of γ. `defaults` are published values.

    `predicted` predicts the normaliser, in place of a table that follows γ. `hinge`: [d + m]₊² stands for d.
    `referenced`: d − d^ref does. `popularity`: d_ij − ζ_j does.
    """
    # arguments of the parts, and their defaults
    of_temperature, of_gamma = _own(temperature), _own(gamma) if gamma else {}
    of_predicted = _own(predicted) if predicted else {}
    of_scent = {"scent": False, **_own(ScentGamma)} if gamma in (ConstantGamma, CosineGamma) else {}
    if not robust:
        of_temperature.pop("rho", None)  # there is no ρ; the network `dist` divides by its own default
        of_temperature.pop("tau_start", None)  # cross-entropy's τ rises while all similarities are alike
    of_popularity = _own(Popularity) if popularity else {}
    of_loss = []
    if temperature.learns and robust:
        of_loss.append("rho")
    if temperature.learns and gamma is not None:
        of_loss += ["tau_gradient", "tau_gradient_limit"]
    if predicted:
        of_loss.append("eps")
    elif gamma not in (None, NoMemory):
        of_loss += ["drift"] if popularity else ["eps", "drift"]
    if hinge:
        of_loss.append("margin")
    if referenced:
        of_loss.append("distillation")
    own = _own(GlobalContrastiveLoss)
    arguments = {
        **{name: own[name] for name in of_loss},
        **of_gamma,
        **of_scent,
        **of_predicted,
        **of_temperature,
        **of_popularity,
    }
    assert defaults.keys() <= arguments.keys()
    arguments |= defaults

    def build(context: ObjectiveContext, **given: Any) -> Objective:
        return GlobalContrastiveLoss(
            context,
            _part(temperature, given, context),
            _part(ScentGamma if given.get("scent") else gamma, given) if gamma else None,
            predicted=_part(predicted, given, context) if predicted else None,
            robust=robust,
            referenced=referenced,
            popularity=_part(Popularity, given, context) if popularity else None,
            **{name: given[name] for name in of_loss},
        )

    # the row's text
    sums: dict[type[Gamma] | None, str] = {
        None: "log Σ_{j in batch} exp(d_ij/τ)",
        NoMemory: "log Σ_{j≠i in batch} exp(d_ij/τ)",
    }
    expectation = "log E_j exp(d_ij/τ)" if predicted else sums.get(gamma, "log E_j exp(d_ij/τ)")
    if hinge:
        expectation = expectation.replace("d_ij", "[d_ij + m]₊²")
    if referenced:
        expectation = expectation.replace("d_ij", "(d_ij − d^ref_ij)")
    if popularity:
        expectation = expectation.replace("E_j exp(d_ij/τ)", "(ε_i + E_j exp((d_ij − ζ_j)/τ))") + " + ζ_i"
    if robust:
        expectation = f"τ ({expectation} + ρ)" if temperature.learns else f"τ {expectation}"
    kinds = {None: "–", NoMemory: "1", ConstantGamma: "constant", CosineGamma: "cosine", ScentGamma: "per sample"}
    kind = "predicted" if predicted else kinds[gamma]
    return ObjectiveSpec(title, f"½ mean Σ {expectation}", temperature.kind, kind, source, arguments, build, note)


def _part(part: Callable[..., Any], given: dict[str, Any], *context: ObjectiveContext) -> Any:
    """Build a part from those of the objective's arguments that are its own."""
    return part(*context, **{name: given[name] for name in _own(part) if name in given})


def _minibatch(
    title: str, loss: type[Objective], formula: str, source: str, *, temperature: str = "–", gamma: str = "–"
) -> ObjectiveSpec:
    """Build a row outside the family: its arguments and their published values are in the signature of its class."""
    return ObjectiveSpec(title, formula, temperature, gamma, source, _own(loss), loss)


_MLP: dict[str, Any] = {"network": "mlp", "feature_scale": 0.0, "dropout": 0.0, "tau_max": 0.2}
_ISOGCLR: dict[str, Any] = {"tau_optimizer": "momentum", "temperature": 0.01, "tau_min": 0.005, "tau_max": 0.05}
_FASTCLIP: dict[str, Any] = {"gamma_min": 0.2, "gamma_decay_epochs": 18.0}
_V3: dict[str, Any] = {"rho": 6.5, "tau_lr": 2e-4, "tau_threshold": 0.03}

OBJECTIVES: dict[str, ObjectiveSpec] = {
    "clip": _family("CLIP", LearnableTemperature, None, "arXiv 2103.00020", robust=False),
    "clip-constant": _family(
        "CLIP, constant τ", ConstantTemperature, None, "arXiv 2103.00020", robust=False, temperature=0.07
    ),
    "clip-per-sample": _family(
        "CLIP, τ per sample", PerSampleTemperature, None, "arXiv 2103.00020, 2305.11965", robust=False,
        temperature=0.07, tau_lr=1e-3,
    ),
    "clip-network": _family(
        "CLIP, τ by a network", NetworkTemperature, None, "arXiv 2103.00020, 2404.04575; the combination is new here",
        robust=False, **_MLP, tau_lr=1e-3,
    ),
    "dcl": _family("DCL", ConstantTemperature, NoMemory, "arXiv 2110.06848", robust=False, temperature=0.1),
    "sogclr": _family("SogCLR", ConstantTemperature, ConstantGamma, "arXiv 2202.12387"),
    "isogclr": _family(
        "iSogCLR", PerSampleTemperature, ConstantGamma, "arXiv 2305.11965",
        rho=8.0, tau_lr=0.03, tau_beta=0.5, tau_gradient_limit=5.0, **_ISOGCLR,
    ),
    "tempnet": _family("TempNet", NetworkTemperature, ConstantGamma, "arXiv 2404.04575", rho=7.0),
    "disttempnet": _family(
        "DistTempNet", NetworkTemperature, ConstantGamma, "arXiv 2404.04575", rho=7.0,
        note="the defaults are TempNet's as published; the published code of DistTempNet has rho = 9.5 and network = "
        "'dist' with prototypes = 512 and tau_min = .001: configs/cc12m_vitb32_v0.toml",
    ),
    "disttempnet-v1": _family(
        "DistTempNet-v1", NetworkTemperature, CosineGamma, "arXiv 2404.04575, 2407.01445",
        rho=2.9, **_MLP, tau_initial=0.065, tau_lr=1e-4, tau_start="ahead",
    ),
    "fastclip-v0": _family(
        "FastCLIP-v0", LearnableTemperature, CosineGamma, "arXiv 2407.01445", robust=False, **_FASTCLIP
    ),
    "fastclip-v1": _family(
        "FastCLIP-v1", ConstantTemperature, CosineGamma, "arXiv 2407.01445", temperature=0.03, **_FASTCLIP
    ),
    "fastclip-v2": _family(
        "FastCLIP-v2", PerSampleTemperature, CosineGamma, "arXiv 2407.01445",
        rho=7.0, tau_gradient_limit=5.0, **_FASTCLIP,
    ),
    "fastclip-v3": _family(
        "FastCLIP-v3", LearnableTemperature, CosineGamma, "arXiv 2407.01445", **_V3, **_FASTCLIP
    ),
    "fastclip-v3-constant-gamma": _family(
        "FastCLIP-v3, constant γ", LearnableTemperature, ConstantGamma, "arXiv 2407.01445", **_V3, gamma=0.2
    ),
    "scent": _family(
        "SCENT", LearnableTemperature, ScentGamma, "arXiv 2602.02877",
        rho=11.0, tau_lr=6.25e-5, tau_threshold=0.03, eps=1e-6,
    ),
    "drrho": _family(
        "DRRho-CLIP", ConstantTemperature, CosineGamma, "arXiv 2505.06699",
        referenced=True, temperature=0.01, gamma_min=0.33, gamma_decay_epochs=33.0,
        note="needs the features of a reference model, the section [reference] of a run",
    ),
    "drrho-learnable": _family(
        "DRRho-CLIP, learnable τ", LearnableTemperature, CosineGamma, "arXiv 2505.06699",
        referenced=True, gamma_min=0.33, gamma_decay_epochs=33.0, **_V3,
        note="as drrho; ρ and the rate of τ are FastCLIP-v3's",
    ),
    "nuclr": _family(
        "NUCLR", ConstantTemperature, ConstantGamma, "arXiv 2410.09156", popularity=True, temperature=0.01,
    ),
    "neuclip": _family(
        "NeuCLIP", LearnableTemperature, NoMemory, "arXiv 2511.08417", predicted=PrototypeNormaliser, **_V3,
        note="log E_j exp(d_ij/τ) is predicted by prototypes; their rate is not published, nor ε and ρ: those here are "
        "FastCLIP-v3's",
    ),
    "tuneclip": _family(
        "TuneCLIP", ConstantTemperature, ConstantGamma, "arXiv 2601.09859", hinge=True, margin=0.1, temperature=0.01,
        note="τ and γ are not said in the paper's summary that was at hand; meant for a pretrained CLIP, after "
        "train.warm_statistics epochs",
    ),
    "siglip": _minibatch(
        "SigLIP", SigLipLoss, "−(1/B) Σ_ij log σ(±(s_ij/τ + b))", "arXiv 2303.15343",
        temperature=LearnableTemperature.kind,
    ),
    "cyclip": _minibatch(
        "CyCLIP", CyClipLoss, "CLIP + (λ_in/B) Σ_ij (x_i·x_j − y_i·y_j)² + (λ_cross/B) Σ_ij (s_ij − s_ji)²",
        "arXiv 2205.14459", temperature=LearnableTemperature.kind,
    ),
    "vicreg": _minibatch(
        "VICReg", VicRegLoss, "λ MSE(x, y) + μ mean_d max(0, 1 − std_d) + ν Σ_{d≠e} cov_de²/D", "arXiv 2105.04906"
    ),
    "onlineclr": _minibatch(
        "onlineCLR", OnlineClrLoss, "τ log E_neg exp(s/τ) + 10 τ log E_pos exp(−s/10τ)", "arXiv 2305.11965 (code)",
        temperature=ConstantTemperature.kind, gamma="constant",
    ),
    "amorlip": _minibatch(
        "AmorLIP", AmorLipLoss, "½ mean Σ (−s_ii + τ Σ_j w_ij exp(s_ij/τ) / Z̃_i) + ½ ρ τ", "arXiv 2505.18983",
        temperature=LearnableTemperature.kind, gamma="amortised",
    ),
}  # fmt: skip


_POSITIVE, _RATE, _WEIGHT = Range(0, 10, above=True), Range(0, 10), Range(0, 10**6)
_SHARE = Range(0, 1, above=True)

ARGUMENT_RANGES: dict[str, Range] = {
    **dict.fromkeys(("temperature", "tau_min", "tau_max"), _POSITIVE),
    **dict.fromkeys(("tau_lr", "tau_threshold"), _RATE),
    **dict.fromkeys(("tau_beta", "tau_beta2"), Range(0, 1, above=True, below=True)),
    **dict.fromkeys(("gamma", "gamma_min", "tau_lr_decay"), _SHARE),
    **dict.fromkeys(("in_modal", "cross_modal", "invariance", "variance", "covariance"), _WEIGHT),
    "scent_log_a": Range(-100, 100),
    "gamma_decay_epochs": Range(0, 10**6, above=True),
    "tau_start_epoch": integers(0, 10**6),
    "rho": Range(0, 100, above=True),  # at 0 the best τ is infinite
    "tau_gradient_limit": Range(0, 10**6),
    "tau_initial": Range(0, 10),
    "eps": Range(0, 1),
    "margin": Range(0, 2),
    "zeta": Range(-10, 10),
    "zeta_lr": _RATE,
    "zeta_theta": _SHARE,
    "zeta_start_epoch": integers(0, 10**6),
    "distillation": _WEIGHT,
    "drift": Range(0, 1),
    "dropout": Range(0, 1, below=True),
    "feature_scale": Range(0, 10**4),
    "prototypes": integers(1, 2**20),
    "bias": Range(-1000, 1000),
    "normaliser_steps": integers(0, 10**4),
    "partition_steps": integers(0, 10**4),
    "partition_lr": _POSITIVE,
    **dict.fromkeys(("partition_average", "partition_share"), Range(0, 1, below=True)),
    "partition_share_epochs": Range(0, 10**6, above=True),
    "rho_flip_epoch": integers(0, 10**6),
    "normaliser_lr": _POSITIVE,
    "normaliser_restart": integers(1, 10**12),
}
# Arguments that came after runs had been saved without them: the value that those runs were trained with.
LATER_ARGUMENTS: dict[str, Any] = {
    "tau_gradient_limit": 5.0, "eps": 0.0, "drift": 0.0, "tau_start": "epoch", "scent": False,
    "scent_log_a": 10.0, "tau_initial": 0.0,
}  # fmt: skip

_SIZES = {
    "num_samples": integers(1, 10**12),
    "embed_dim": integers(1, 65_536),
    "seed": SEEDS,
    "steps_per_epoch": integers(0, 10**12),
}


def _plain(value: Any) -> Any:
    """Return a scalar of numpy or torch as a Python number."""
    scalar = isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0)
    return value.item() if scalar else value


def _checked(what: str, default: Any, value: Any, allowed: Range | None) -> Any:
    """Return the value in its range's type.

    Raises:
        ValueError: it is not of its default's kind: a number in its range, a boolean, a string.
    """
    if allowed is not None:
        try:
            number = allowed.check(value)
        except ValueError as error:
            raise ValueError(f"{what} {error}, got {value!r}") from None
        return value if type(value) is int else number
    if not isinstance(value, type(default)):
        kind = {bool: "true or false", str: "a string"}[type(default)]
        raise ValueError(f"{what} must be {kind}, got {value!r}")
    return value


def build_loss(
    name: str,
    *,
    num_samples: int,
    embed_dim: int,
    seed: int = 0,
    steps_per_epoch: int = 0,
    shard_state: bool = False,
    ring: bool = False,
    **arguments: Any,
) -> Objective:
    """Build an objective by name, after torch.distributed is initialised.

    Args:
        name: a key of `OBJECTIVES`.
        num_samples: N, the size of the data set; sample ids lie in [0, N).
        embed_dim: D, width of the features.
        seed: of the temperature network's initial weights and dropout, and of `shuffle`; the same on every rank.
        steps_per_epoch: calls of the loss in training that make an epoch, such as len(loader); 0 = you call
            `set_epoch(epoch)` at the start of every epoch.
        shard_state: true: each rank holds the per-sample state of its own N / K samples, and `gather_state` collects
            it. False: every rank holds all of it, and any rank may save `state_dict()`.
        ring: true: the ranks hand their features round, forward and backward, and none holds those of all. The same
            loss and gradients, for the objectives of the family that look at one block of columns at a time.
        arguments: the objective's own; see `OBJECTIVES[name].arguments`.

    Returns:
        A module called as `loss(Features.of(image_embeddings, text_embeddings), ids)` with this rank's rows. Give your
        optimizer `loss.parameter_groups()`. It has `set_epoch(epoch)` and `temperatures(image, text)`.

    Raises:
        ValueError: unknown name or argument (the message lists what exists), or a value out of range.

    Example:
        >>> from disttempnet import Features, build_loss
        >>> loss = build_loss("disttempnet-v1", num_samples=1000, embed_dim=16)
        >>> tower = torch.nn.Linear(32, 16)  # in place of both towers
        >>> groups = [{"params": tower.parameters()}, *loss.parameter_groups()]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
        >>> images, texts, ids = torch.randn(8, 32), torch.randn(8, 32), torch.arange(8)
        >>> for epoch in range(2):
        ...     loss.set_epoch(epoch)
        ...     out = loss(Features.of(tower(images), tower(texts)), ids)
        ...     optimizer.zero_grad()
        ...     out.total.backward()
        ...     optimizer.step()
        >>> build_loss("siglib", num_samples=1000, embed_dim=16)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: unknown objective 'siglib'. Did you mean 'siglip'? Known: ...
    """
    sizes = {"num_samples": num_samples, "embed_dim": embed_dim, "seed": seed, "steps_per_epoch": steps_per_epoch}
    return _build(name, sizes, shard_state, ring, arguments, bounds=True)


def rebuild_loss(
    name: str,
    *,
    num_samples: int,
    embed_dim: int,
    seed: int,
    shard_state: bool,
    arguments: dict[str, Any],
    ring: bool = False,
) -> Objective:
    """Build the objective of an older run, whose arguments may lie outside their ranges but not be of another kind.

    Raises:
        ValueError: unknown name or argument, a value of another kind, or one that the objective cannot work with.
    """
    sizes = {"num_samples": num_samples, "embed_dim": embed_dim, "seed": seed, "steps_per_epoch": 0}
    return _build(name, sizes, shard_state, ring, dict(arguments), bounds=False)


def with_later_arguments(name: str, arguments: dict[str, Any], global_batch: int) -> dict[str, Any]:
    """Return the arguments of a saved run, with those that its version did not have yet, as it was trained.

    In versions without `tau_gradient_limit` ρ = 0 stood for .3 · log(B − 1).

    Args:
        name: the objective's; an unknown one has no later arguments.
        arguments: all that the run was saved with.
        global_batch: B of that run.
    """
    known = OBJECTIVES[name].arguments if name in OBJECTIVES else {}
    completed = {key: value for key, value in LATER_ARGUMENTS.items() if key in known} | arguments
    if "tau_gradient_limit" in known and "tau_gradient_limit" not in arguments and completed.get("rho") == 0:
        completed["rho"] = 0.3 * math.log(max(global_batch - 1, 1))
    return completed


def _build(
    name: str, sizes: dict[str, int], shard_state: bool, ring: bool, arguments: dict[str, Any], *, bounds: bool
) -> Objective:
    if name not in OBJECTIVES:
        raise ValueError(unknown_name("objective", name, OBJECTIVES))

    # arguments and sizes, each of its default's kind and in its range
    spec = OBJECTIVES[name]
    for argument, value in arguments.items():
        if argument not in spec.arguments:
            raise ValueError(unknown_name(f"argument of objective {name}:", argument, spec.arguments))
        default, allowed = spec.arguments[argument], ARGUMENT_RANGES.get(argument)
        if allowed is not None and not bounds:
            allowed = allowed.kind
        arguments[argument] = _checked(f"objective {name}: {argument}", default, _plain(value), allowed)
    for size, value in sizes.items():
        sizes[size] = _checked(f"objective {name}: {size}", 0, _plain(value), _SIZES[size])

    # the objective; its parts compare arguments between ranks (CyCLIP's CLIP does)
    try:
        objective = spec.build(
            ObjectiveContext(sizes["num_samples"], sizes["embed_dim"], sizes["seed"], shard_state, ring),
            **{**spec.arguments, **arguments},
        )
    except ValueError as error:
        raise ValueError(f"objective {name}: {error}") from None
    if ring and not objective.ring:
        what = " with shuffle" if arguments.get("shuffle") else ""
        raise ValueError(f"objective {name}: it needs the features of all ranks at once{what}: leave ring out")
    for part in objective.modules():
        if isinstance(part, Objective):
            part.steps_per_epoch = sizes["steps_per_epoch"]
            part.arguments = f"{name} {sizes} {arguments} shard_state={shard_state} ring={ring}"
    _mark_for_accelerate(objective)
    return objective


def _mark_for_accelerate(objective: Objective) -> None:
    """Let `Accelerator.prepare` pass an objective without parameters unchanged.

    On CPUs it wraps every module in DDP, which refuses modules without parameters; on GPUs it checks first.
    """
    if not torch.cuda.is_available() and not any(p.requires_grad for p in objective.parameters()):
        objective._is_accelerate_prepared = True
