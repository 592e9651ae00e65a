"""Draw the figures of docs/concepts/: `python -m tools.draw_concepts`.

Both are computed, not sketched: a simulated normaliser, and the weights of normal similarities at a temperature.
"""

from pathlib import Path
from statistics import NormalDist

import numpy as np

from disttempnet.report.runs.plots import FAINT, RUN_COLOURS, RUN_STYLES, grid, styled, svg_text

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
WIDTH, HEIGHT = 10.0, 3.6  # inches
SAMPLES, DIM, TAU, GAMMA, VISITS = 20_000, 64, 0.05, 0.2, 40
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
SHOWN_BATCH, ANCHORS = 32, 200
NEGATIVES, RHO = 100, 1.5
SEED = 5


def leads(rng: np.random.Generator) -> np.ndarray:
    """Return d_ij of the anchors to all samples, [anchors, samples]: unit features, the pair at similarity 0.6."""
    samples = rng.normal(size=(SAMPLES, DIM))
    samples /= np.linalg.norm(samples, axis=1, keepdims=True)
    return samples[:ANCHORS] @ samples[ANCHORS:].T - 0.6


def log_means(d: np.ndarray) -> np.ndarray:
    """Return log mean exp(d/τ) over the last axis."""
    scaled = d / TAU
    top = scaled.max(axis=-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(scaled - top).mean(axis=-1))


def visits(d: np.ndarray, batch: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the batches' own log normalisers and the tracked ones, both [visits, anchors]."""
    own = np.stack([log_means(d[:, rng.choice(d.shape[1], batch, replace=False)]) for _ in range(VISITS)])
    tracked = own.copy()
    for i in range(1, VISITS):
        tracked[i] = np.logaddexp(np.log1p(-GAMMA) + tracked[i - 1], np.log(GAMMA) + own[i])
    return own, tracked


@styled
def estimator() -> str:
    """Draw one anchor's normaliser over its visits, and the error of all anchors against the batch size."""
    rng = np.random.default_rng(SEED)
    d = leads(rng)
    exact = log_means(d)
    figure, ((left, right),) = grid(1, 2, height=HEIGHT, width=WIDTH)

    # one anchor over its visits
    own, tracked = visits(d, SHOWN_BATCH, rng)
    steps = np.arange(1, VISITS + 1)
    left.axhline(exact[0], color=FAINT, linewidth=1.2, label="exact, over all samples")
    left.plot(steps, own[:, 0], "o", color=RUN_COLOURS[1], markersize=4, label=f"of a batch of {SHOWN_BATCH}")
    left.plot(steps, tracked[:, 0], color=RUN_COLOURS[0], linewidth=1.8, label="tracked, log u")
    left.set_title("log normaliser of one anchor")
    left.set_xlabel("visit")

    # the error after all visits, against the batch
    errors = {"of a batch": [], "tracked": []}
    for batch in BATCHES:
        both = visits(d, batch, rng)
        for name, values in zip(errors, both, strict=True):
            errors[name].append(np.sqrt(np.mean((values[VISITS // 2 :] - exact) ** 2)))
    right.plot(BATCHES, errors["of a batch"], "o" + RUN_STYLES[1], color=RUN_COLOURS[1], markersize=4)
    right.plot(BATCHES, errors["tracked"], "o" + RUN_STYLES[0], color=RUN_COLOURS[0], markersize=4)
    right.set_xscale("log", base=2)
    right.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    right.minorticks_off()
    right.set_ylim(bottom=0)
    right.set_title("root mean square error of log u")
    right.set_xlabel("batch")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return svg_text(figure)


def weights(similarities: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """Return the softmax of similarities/τ, [τ, negatives]."""
    scaled = similarities / tau[:, None]
    shares = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def divergence(similarities: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """Return KL(weights ‖ equal weights) at each τ."""
    p = weights(similarities, tau)
    return np.log(similarities.size) + (p * np.log(np.maximum(p, 1e-300))).sum(axis=1)


@styled
def temperature() -> str:
    """Draw the weights of negatives at three temperatures, and how ρ chooses τ for two spreads of similarities."""
    places = (np.arange(NEGATIVES) + 0.5) / NEGATIVES
    similarities = np.array([NormalDist(0.1, 0.1).inv_cdf(1 - place) for place in places])
    figure, ((left, right),) = grid(1, 2, height=HEIGHT, width=WIDTH)

    # weights, the nearest negative first
    for i, tau in enumerate((0.02, 0.05, 0.2)):
        (share,) = weights(similarities, np.array([tau]))
        left.plot(range(1, NEGATIVES + 1), 100 * share, RUN_STYLES[i], color=RUN_COLOURS[i], label=f"τ = {tau:g}")
    left.set_xscale("log")
    left.set_xticks((1, 3, 10, 30, 100), ("1st", "3rd", "10th", "30th", "100th"))
    left.minorticks_off()
    left.set_ylim(bottom=0)
    left.set_title("weight of a negative, %")
    left.set_xlabel("negatives, the nearest first")
    left.legend(frameon=False)

    # the divergence over τ, and where it is ρ
    tau = np.geomspace(0.01, 0.3, 400)
    for i, (spread, label) in enumerate(((0.05, "similarities spread by 0.05"), (0.1, "by 0.1"))):
        kl = divergence(0.1 + (similarities - 0.1) * spread / 0.1, tau)
        best = float(np.interp(-RHO, -kl, tau))
        right.plot(tau, kl, RUN_STYLES[i], color=RUN_COLOURS[i], label=f"{label}: best τ = {best:.3f}")
        right.plot([best, best], [0, RHO], ":", color=RUN_COLOURS[i], linewidth=1.2)
    right.axhline(RHO, color=FAINT, linewidth=1.2)
    right.annotate(f"ρ = {RHO:g}", (tau[-1], RHO), xytext=(0, 4), textcoords="offset points", ha="right")
    right.set_xscale("log")
    right.set_xticks((0.01, 0.03, 0.1, 0.3), ("0.01", "0.03", "0.1", "0.3"))
    right.minorticks_off()
    right.set_ylim(0, 6)  # room for the legend
    right.set_title("KL(weights ‖ equal weights)")
    right.set_xlabel("τ")
    right.legend(frameon=False)
    return svg_text(figure)


DRAWN = {"estimator.svg": estimator, "temperature.svg": temperature}

if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (FIGURES / name).write_text(draw(), encoding="utf-8")
        print(FIGURES / name)
