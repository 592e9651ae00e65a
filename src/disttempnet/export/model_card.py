"""Model card of a run, in Markdown: data, objective, settings, results with intervals over seeds, licence, limits.

Everything in it comes from the run's own files. Values that name files of a machine are cut to their last part, and
credentials never reach a run's files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttempnet.config import defaults, flat, public_table
from disttempnet.config.identity import NO_EFFECT_ON_RESULT
from disttempnet.errors import UserError, notice
from disttempnet.evaluation.results.averages import Average
from disttempnet.evaluation.scores import Scores, metric_title, percent
from disttempnet.evaluation.tasks import task_title
from disttempnet.losses import OBJECTIVES
from disttempnet.models import Towers
from disttempnet.report.compact import CompactResult, compact
from disttempnet.report.evaluations.compare import EvaluatedModel
from disttempnet.report.read import RunRecord, read_run
from disttempnet.report.seeds.groups import by_config
from disttempnet.report.seeds.intervals import mean_interval
from disttempnet.sanitize import markdown_cell, one_line

UNKNOWN_LICENCE = "unknown"
# `ViT-B-32`, `laion2b_s34b_b79k`, `sentence-transformers/all-MiniLM-L6-v2`, `embedded:emoji/train`
PUBLIC_NAME = re.compile(r"((hf-hub|package|open_clip|embedded|emoji|scenes|icons):)?[\w.-]+(/[\w.-]+)?")
NOT_SHOWN = NO_EFFECT_ON_RESULT | {"data.train", "train.stop_after_steps", "eval.tasks"}


@dataclass(frozen=True)
class CardFacts:
    """Facts that a model card is made from.

    Attributes:
        repository: `ORG/NAME`.
        licence: identifier of the Hub, such as `mit`; `UNKNOWN_LICENCE` where nobody said one.
        data: description of the training data in the author's words; may be empty.
        run: the run's folder, read.
        towers, step: of the checkpoint.
        seeds: finished runs of this config, one of each seed, this one among them if it is finished.
        evaluation: of this checkpoint on a data root; None without one.
    """

    repository: str
    licence: str
    data: str
    run: RunRecord
    towers: Towers
    step: int
    seeds: Sequence[CompactResult]
    evaluation: EvaluatedModel | None


def same_config(run: RunRecord) -> list[CompactResult]:
    """Return the finished runs beside a run, itself among them, whose configs differ in the seed alone."""
    results = []
    for folder in sorted(path.parent for path in run.folder.absolute().parent.glob("*/run.json")):
        try:
            found = compact(read_run(folder))
        except UserError as error:
            notice(f"left out of the seeds: {error}")
            continue
        if found.finished:
            results.append(found)
    for group in by_config(results):
        if any(one.name == run.config.name and one.seed == run.config.train.seed for one in group):
            seeds = {one.seed: one for one in group}  # a copy of a run counts once
            return [seeds[seed] for seed in sorted(seeds)]
    return []


def public_value(value: Any) -> Any:
    """Return a value of a config without places on a machine: of a path or URL only the last part."""
    if isinstance(value, Mapping):
        return {key: public_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_value(inner) for inner in value]
    if not isinstance(value, str) or not re.search(r"[/\\~]", value):
        return value
    if PUBLIC_NAME.fullmatch(value) and not Path(value).exists():
        return value
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1].partition("?")[0]


def model_card(card: CardFacts) -> str:
    """Return the card as Markdown with the Hub's metadata at its head."""
    parts = (_head(card), _use(card), _training(card), _results(card), _limits(card), _licence(card), _citation(card))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _head(card: CardFacts) -> list[str]:
    run, config = card.run, card.run.config
    spec = OBJECTIVES[config.loss.name]
    weights = card.run.facts.get("parameters")
    size = f", {weights / 1e6:,.1f} M parameters" if weights else ""
    samples = run.facts.get("num_samples")
    pairs = f" on {samples:,} pairs of images and captions" if samples else ""
    return [
        "---",
        "library_name: open_clip",
        "pipeline_tag: zero-shot-image-classification",
        f"license: {card.licence}",
        "tags:",
        "- clip",
        "- disttempnet",
        "---",
        f"# {card.repository.partition('/')[2]}",
        "",
        f"A CLIP model ({_code(public_value(config.model.name))}{size}), trained with {spec.title}{pairs}.",
    ]


def _use(card: CardFacts) -> list[str]:
    place = f"hf-hub:{card.repository}"
    return [
        "## Use",
        "```python",
        "import open_clip",
        "",
        f'model, preprocess = open_clip.create_model_from_pretrained("{place}")',
        f'tokenizer = open_clip.get_tokenizer("{place}")',
        "```",
        "",
        "```sh",
        f"disttempnet evaluate {place}",
        f'disttempnet search {place} photos "a red apple"',
        "```",
        "",
        f"Images are {card.towers.image_size} pixels square; captions have at most "
        f"{card.towers.tokenizer(['']).shape[1]} tokens.",
    ]


def _training(card: CardFacts) -> list[str]:
    config, facts = card.run.config, card.run.facts
    spec = OBJECTIVES[config.loss.name]
    data = facts.get("data", {})
    table = public_table(config)
    sources = table["data"]["train"]
    sources = sources if isinstance(sources, list) else [sources]
    names = ", ".join(_code(public_value(_source_name(one))) for one in sources)
    tau = card.run.temperatures[-1] if card.run.temperatures else None
    rows: list[tuple[str, str]] = [
        ("data", f"{markdown_cell(card.data)} ({names})" if card.data else names),
        ("samples", _samples(facts, data)),
        ("objective", f"{spec.title}: {_code(spec.formula)}"),
        (
            "temperature",
            f"{spec.temperature}; `logit_scale` {float(card.towers.module.logit_scale.detach().exp()):.2f}",
        ),
        ("γ", spec.gamma),
        ("length", f"{_counted(card.step, 'step')} of a run of {_counted(config.train.epochs, 'epoch')}"),
        ("global batch", f"{config.data.global_batch:,}"),
        ("seed", str(config.train.seed)),
        ("device", f"{facts.get('device', 'unknown')}, {_counted(facts.get('world_size', 1), 'process')}"),
        ("software", ", ".join(f"{name} {number}" for name, number in facts.get("versions", {}).items())),
        ("revision of the code", str(facts.get("git") or "an installed package")),
        ("digest of the data", _code(str(facts.get("index_digest", "unknown")))),
    ]
    if tau is not None and card.run.has_own_temperatures:
        low, high = float(min(tau.image.min(), tau.text.min())), float(max(tau.image.max(), tau.text.max()))
        rows.append(("τ of the test pairs", f"{low:.3g} to {high:.3g} at the end of training"))
    lines = ["## Training", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]

    # Settings that are not the defaults, in the names of `disttempnet train`.
    known = defaults() | {f"loss.{key}": value for key, value in spec.arguments.items()}
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}  # as in `table`
    own = {key: value for key, value in flat(table).items() if key not in NOT_SHOWN and known.get(key) != value}
    lines += ["", "Settings other than the defaults:", "", "| key | value |", "|---|---|"]
    return lines + [f"| `{key}` | {_code(public_value(value))} |" for key, value in own.items()]


def _source_name(source: Any) -> Any:
    return source.get("path", "") if isinstance(source, Mapping) else source


def _samples(facts: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    total, usable = data.get("samples", facts.get("num_samples")), data.get("usable")
    if not isinstance(total, int):
        return "unknown"
    others = (data.get("held_out", 0), "held out for validation"), (data.get("beyond_limit", 0), "beyond data.limit")
    words = f"{total:,}" + (f", {usable:,} of them usable" if isinstance(usable, int) and usable != total else "")
    return words + "".join(f", {count:,} {what}" for count, what in others if isinstance(count, int) and count)


def _results(card: CardFacts) -> list[str]:
    lines = ["## Results"]
    measured = next((one for one in card.run.evaluations if one.step == card.step), None)
    seeds = [one.seed for one in card.seeds]
    if measured is None:
        lines.append("This checkpoint was not evaluated during training.")
    else:
        lines += _table_of_tasks(measured.scores, card.seeds)
        if len(seeds) > 1:
            listed = ", ".join(map(str, seeds))
            lines += [
                "",
                f"Per cent. Over seeds {listed}: mean of the last evaluations with its 95 % interval (Student's t).",
            ]
        else:
            lines += ["", "Per cent, of one seed. How much another seed would differ is unknown."]
    if card.evaluation is not None:
        lines += ["", *_table_of_evaluation(card.evaluation)]
    return lines


def _table_of_tasks(scores: Mapping[str, Scores], seeds: Sequence[CompactResult]) -> list[str]:
    several = len(seeds) > 1
    head = ["task", "metric", "this model", "chance", *([f"over {len(seeds)} seeds"] if several else [])]
    lines = [_row(head), _row(["---", "---", *["--:"] * (len(head) - 2)])]
    for task, one in scores.items():
        for metric, value in one.metrics.items():
            cells = [
                markdown_cell(task_title(task)),
                metric_title(metric),
                percent(value),
                percent(one.chance.get(metric)),
            ]
            if several:
                values = [s.final[task].metrics[metric] for s in seeds if metric in _metrics(s, task)]
                cells.append(_interval(values, len(seeds)))
            lines.append(_row(cells))
    return lines


def _metrics(result: CompactResult, task: str) -> Mapping[str, float]:
    return result.final[task].metrics if task in result.final else {}


def _interval(values: Sequence[float], seeds: int) -> str:
    """Return `33.5 [31.0, 36.0]`; with the number of seeds where some lack the metric."""
    if not values:
        return "–"
    mean, interval = sum(values) / len(values), mean_interval(values)
    text = percent(mean)
    if interval is not None:
        digits = len(text.partition(".")[2])
        text += f" [{100 * interval.low:.{digits}f}, {100 * interval.high:.{digits}f}]"
    return text if len(values) == seeds else f"{text} n={len(values)}"


def _table_of_evaluation(evaluation: EvaluatedModel) -> list[str]:
    """Return averages and tasks of an evaluation on a data root."""
    shown: list[Average] = [one for one in evaluation.averages.values() if one.mean is not None]
    lines = ["Zero-shot evaluation in the protocol of DataComp's 38 tasks:", "", "| average | |", "|---|--:|"]
    lines += [f"| {one.title} | {percent(one.mean)} |" for one in shown]
    lines += ["", "| task | main metric | |", "|---|---|--:|"]
    for record in evaluation.records.values():
        if record.counts:
            name = metric_title(record.main_metric_name)
            lines.append(f"| {markdown_cell(record.dataset)} | {name} | {percent(record.value)} |")
    return lines


def _limits(card: CardFacts) -> list[str]:
    facts, config = card.run.facts, card.run.config
    samples = facts.get("num_samples")
    lines = [
        "## Limits",
        f"- It knows what {f'{samples:,} pairs' if samples else 'its training pairs'} showed it. What they lack or get "
        "wrong, it lacks and gets wrong, stereotypes included.",
        "- It was not tested for safety, fairness or any use in earnest. Test it on data of your own first.",
        "- Scores are of the tasks above and the prompts that go with them.",
    ]
    if OBJECTIVES[config.loss.name].temperature not in ("constant", "one, learnable", "–"):
        lines.append(
            "- The folder holds one `logit_scale`. Temperatures of samples and their network are in the run alone."
        )
    if len(card.seeds) < 2:
        lines.append("- One seed was trained, or only one lay beside it.")
    if card.run.config.train.stop_after_steps or not card.run.finished:
        lines.append(f"- Training was not at its end: the weights are of step {card.step:,}.")
    # A note names the place of the weights; what is left without it says enough.
    notes = [re.sub(r" '[^']*[/\\][^']*'", "", one_line(str(note))) for note in card.towers.notes]
    return lines + [f"- {note[:1].upper()}{note[1:]}." for note in notes if not re.search(r"[/\\]", note)]


def _licence(card: CardFacts) -> list[str]:
    if card.licence == UNKNOWN_LICENCE:
        text = "Nobody has said under which licence these weights may be used."
    else:
        text = f"The weights: {_code(card.licence)}."
    return ["## Licence", f"{text} The licences of the training data hold beside it. The training code is under MIT."]


def _citation(card: CardFacts) -> list[str]:
    spec = OBJECTIVES[card.run.config.loss.name]
    return ["## Source", f"Trained with DistTempNet. The objective: {spec.title}, {spec.source}."]


def _counted(number: int, noun: str) -> str:
    """Return `1 process` or `2 processes`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(value: Any) -> str:
    """Return a value as code in a cell of a table."""
    text = one_line(str(value)).replace("|", "\\|").replace("`", "'")
    return f"`{text}`" if text else ""
