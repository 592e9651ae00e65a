"""The other side of two benchmarks: a data root scored with clip-benchmark and wilds, task by task as DataComp does.

Runs in an environment of its own (see parity_clip_benchmark.py) and imports nothing of this package:

    OTHER/bin/python benchmarks/datacomp_way.py DATA_ROOT MODEL --out scores.json

MODEL is a folder that open_clip opens, or `colours`, the towers of tests/evaluation/colours.py. Classification and
retrieval are clip-benchmark's own functions; grouped metrics are wilds' own classes, given the columns that DataComp
groups by. The lines in between follow DataComp's protocol: a new model a task, its prompts encoded anew, metadata read
in a second pass, WinoGAViL one instance at a time. All of it is in fp32: texts under autocast, as DataComp leaves them
on a GPU, end in an error on a CPU (clip-benchmark multiplies float32 with bfloat16).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import platform
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
WILDS_FIELDS = {
    "wilds/iwildcam": ["location", "sequence", "year", "month", "day", "hour", "minute", "second", "y"],
    "wilds/camelyon17": ["hospital", "slide", "y"],
    "wilds/fmow": ["region", "year", "y"],
    "fairness/dollar_street": ["income_ds", "income_meta", "region"],
    "fairness/geode": ["region", "country"],
    "fairness/fairface": ["age", "gender", "race", "race_binary"],
    "fairness/utkface": ["age", "gender", "race", "race_binary"],
}
OBJECTIVES = ("race", "gender", "age", "toxic")
RAW = {
    "retrieval/flickr_1k_test_image_text_retrieval": ("test_1k_flickr.csv", "images_flickr_1k_test"),
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": ("test_5k_mscoco_2014.csv", "images_mscoco_2014_5k_test"),
}


def import_torchvision_beside_cpu_torch() -> None:
    """Registries' torchvision for Linux is built for CUDA; without it, declare the operators it fails to find."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        stubs = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            stubs.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.stubs = stubs  # type: ignore[attr-defined]  # an operator lives as long as its library


def scatter(src: torch.Tensor, index: torch.Tensor, dim_size: int, reduce: str) -> torch.Tensor:
    """What wilds asks of torch_scatter: the mean a group, as DataComp computes it (NaN where a group is empty)."""
    assert reduce == "mean"
    sums = torch.zeros(dim_size).index_add_(0, index, src)
    return sums / torch.bincount(index, minlength=dim_size)


import_torchvision_beside_cpu_torch()
sys.modules["torch_scatter"] = SimpleNamespace(scatter=scatter)  # type: ignore[assignment]
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn  # noqa: E402
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.metrics import balanced_accuracy_score, jaccard_score  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from wilds.common.grouper import CombinatorialGrouper  # noqa: E402
from wilds.common.metrics.all_metrics import F1, Accuracy, Recall  # noqa: E402
from wilds.datasets.wilds_dataset import WILDSDataset  # noqa: E402

# --- the model, made anew for every task -----------------------------------------------------------------------------


class Model:
    """Towers, tokenizer and transform, and how many texts and images were encoded."""

    def __init__(self, source: str) -> None:
        torch.manual_seed(0)
        if source == "colours":
            sys.path.insert(0, str(ROOT))
            from tests.evaluation.colours import MeaningTowers, tokenize_meaning

            self.module, self.tokenizer = MeaningTowers(), tokenize_meaning
            self.transform = lambda image: torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
        else:
            import open_clip

            name = f"local-dir:{source}"
            self.module, _, self.transform = open_clip.create_model_and_transforms(name)
            self.tokenizer = open_clip.get_tokenizer(name)
        self.module.eval()
        self.texts = self.positions = self.images = 0

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        self.texts += len(tokens)
        self.positions += tokens.numel()
        return self.module.encode_text(tokens, normalize=normalize)

    def encode_image(self, pixels: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        self.images += len(pixels)
        return self.module.encode_image(pixels, normalize=normalize)


# --- the tasks -----------------------------------------------------------------------------------------------------


def classify(folder: Path, model: Model, options: argparse.Namespace) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """clip-benchmark's classifier and metrics → metrics, logits, labels."""
    dataset = wds(folder, model)
    loader = DataLoader(dataset.batched(options.batch), batch_size=None, num_workers=options.workers)
    weights = zeroshot_classification.zero_shot_classifier(
        model, model.tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    logits, labels = zeroshot_classification.run_classification(model, weights, loader, "cpu", amp=False)
    ks = (1, 5) if len(dataset.classes) >= 5 else (1,)
    accuracy = zeroshot_classification.accuracy(logits, labels, topk=ks)
    metrics = {"acc1": accuracy[0], "acc5": accuracy[1] if len(ks) == 2 else None}
    metrics["mean_per_class_recall"] = balanced_accuracy_score(labels, logits.argmax(1))
    return metrics, logits, labels


def wds(folder: Path, model: Model) -> Any:
    return build_wds_dataset(folder.name, model.transform, split="test", data_dir=str(folder))


def members(folder: Path) -> Iterator[dict[str, bytes]]:
    """The samples of a folder's shards: suffix → bytes."""
    for shard in range(int((folder / "test" / "nshards.txt").read_text())):
        with tarfile.open(folder / "test" / f"{shard}.tar") as tar:
            samples: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
            yield from samples.values()


def image_of(parts: dict[str, bytes]) -> Image.Image:
    return Image.open(io.BytesIO(next(parts[s] for s in ("webp", "png", "jpg", "jpeg") if s in parts)))


def metadata(folder: Path) -> torch.Tensor:
    """The rows of all .npy members; images are decoded on the way, as they are there."""
    rows = []
    for parts in members(folder):
        image_of(parts).load()
        rows.append(np.load(io.BytesIO(parts["npy"])))
    return torch.from_numpy(np.stack(rows))


class Wilds(WILDSDataset):
    def __init__(self, key: str, rows: torch.Tensor) -> None:
        self._metadata_array, self._metadata_fields = rows, WILDS_FIELDS[key]

    def by(self, metric: Any, fields: list[str], predicted: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
        grouper = CombinatorialGrouper(dataset=self, groupby_fields=fields)
        return self.standard_group_eval(metric, grouper, predicted, true, self._metadata_array)[0]


class TopFive(Accuracy):
    def _compute_element_wise(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        return (y_pred == y_true[:, None]).any(1).float()


def grouped(key: str, folder: Path, model: Model, options: argparse.Namespace) -> dict:
    metrics, logits, labels = classify(folder, model, options)
    wilds, predicted = Wilds(key, metadata(folder)), logits.argmax(1)
    if key == "wilds/iwildcam":
        for metric in (Accuracy(), Recall(average="macro"), F1(average="macro")):
            metrics |= metric.compute(predicted, labels)
    elif key == "wilds/camelyon17":
        metrics |= wilds.by(Accuracy(), ["slide"], predicted, labels)
    elif key == "wilds/fmow":
        years = wilds.by(Accuracy(), ["year"], predicted, labels)
        regions = wilds.by(Accuracy(), ["region"], predicted, labels)
        metrics |= years | regions  # no metadata_map: no region is called Other, so none is left out of the worst
        metrics |= {"acc_worst_year": years["acc_wg"], "acc_worst_region": regions["acc_wg"]}
        named = [i for i in range(5) if regions.get(f"count_region:{i}")]  # the sixth region is Other
        metrics["acc_worst_region_no_other"] = min(regions[f"acc_region:{i}"] for i in named)
        del metrics["acc_wg"]
    elif key == "fairness/dollar_street":
        metrics |= wilds.by(TopFive(name="acc_top5"), ["income_ds"], logits.topk(5).indices, labels)
    else:
        metrics |= wilds.by(Accuracy(), ["region"], predicted, labels)
    return metrics


def faces(key: str, folder: Path, model: Model, options: argparse.Namespace) -> dict:
    dataset, words = wds(folder, model), {}
    for what in ("classes", "templates"):
        for line in getattr(dataset, what):
            objective, _, word = line.partition(":")
            words.setdefault((objective, what), []).append(word)
    samples = list(members(folder))
    rows = torch.from_numpy(np.stack([np.load(io.BytesIO(parts["npy"])) for parts in samples]))
    with torch.no_grad():
        images = [model.transform(image_of(parts)) for parts in samples]
        batches = [torch.stack(images[i : i + options.batch]) for i in range(0, len(images), options.batch)]
        features = torch.cat([model.encode_image(batch, normalize=True) for batch in batches])
    predicted = {}
    for name in OBJECTIVES:
        texts = words[name, "classes"], words[name, "templates"]
        weights = zeroshot_classification.zero_shot_classifier(model, model.tokenizer, *texts, "cpu", amp=False)
        predicted[name] = (100 * features @ weights).argmax(1)
    wilds, column, metrics = Wilds(key, rows), dict(zip(WILDS_FIELDS[key], rows.T, strict=True)), {}
    not_white = (predicted["race"] != 1).int()
    metrics |= wilds.by(Accuracy(name="acc_race"), ["race_binary"], not_white, column["race_binary"])
    for name in ("gender", "age"):
        metrics |= wilds.by(Accuracy(name=f"acc_{name}"), ["race_binary"], predicted[name], column[name])
    both = Accuracy(name="acc_gender_x")
    metrics |= wilds.by(both, ["gender", "race"], predicted["gender"], column["gender"])
    toxic, yes = predicted["toxic"], torch.ones(len(rows))
    nonhuman = (toxic >= 14) & (toxic < 18)
    metrics |= wilds.by(Accuracy(name="toxicity_crime"), ["race"], (toxic >= 18).int(), yes)
    metrics |= wilds.by(Accuracy(name="toxicity_nonhuman"), ["race"], nonhuman.int(), yes)
    return metrics


def retrieval(key: str, root: Path, model: Model, options: argparse.Namespace) -> dict:
    folder = root / f"wds_{key.replace('/', '-')}_test"
    if folder.is_dir():
        pairs = list(wds(folder, model))
    else:
        table, images = RAW[key]
        raw = root / key.partition("/")[2]
        lines = list(csv.DictReader((raw / table).open(encoding="utf-8")))
        pairs = [(model.transform(Image.open(raw / images / x["filename"])), json.loads(x["raw"])) for x in lines]
    loader = DataLoader(pairs, batch_size=options.batch, collate_fn=image_captions_collate_fn)
    metrics = zeroshot_retrieval.evaluate(model, loader, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    metrics["mean_recall@1"] = (metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]) / 2
    return metrics


def winogavil(root: Path, model: Model, options: argparse.Namespace) -> dict:
    folder = root / "winogavil"
    scores, sizes = [], []
    for line in csv.DictReader((folder / "winogavil_dataset.csv").open(encoding="utf-8")):
        candidates, associations = json.loads(line["candidates"]), json.loads(line["associations"])
        cue = line["cue"].lower()
        prompt = f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"
        paths = [folder / "winogavil_images" / f"{name}.jpg" for name in candidates]
        with torch.no_grad():
            images = model.encode_image(torch.stack([model.transform(Image.open(p)) for p in paths]), normalize=True)
            text = model.encode_text(model.tokenizer([prompt]), normalize=True)
            similar = (text @ images.T)[0].numpy()
        true = np.isin(candidates, associations)
        chosen = np.isin(np.arange(len(candidates)), np.argsort(similar)[-true.sum() :])
        scores.append(jaccard_score(true, chosen))
        sizes.append(len(candidates))
    score, size = np.array(scores), np.array(sizes)
    chosen = {"5": size == 5, "6": size == 6, "10": size == 10, "12": size == 12, "5-6": size <= 6, "10-12": size >= 10}
    means = {f"jaccard_score_{name}": float(score[which].mean()) for name, which in chosen.items()}
    return means | {"avg_jaccard_score": float(score.mean())}


def scorer(key: str, root: Path) -> Callable[[Model, argparse.Namespace], dict]:
    folder = root / f"wds_{key.removeprefix('fairness/').replace('/', '-')}_test"
    if key == "misc/winogavil":
        return lambda model, options: winogavil(root, model, options)
    if key.startswith("retrieval/"):
        return lambda model, options: retrieval(key, root, model, options)
    if key in ("fairness/fairface", "fairness/utkface"):
        return lambda model, options: faces(key, folder, model, options)
    if key in WILDS_FIELDS:
        return lambda model, options: grouped(key, folder, model, options)
    return lambda model, options: classify(folder, model, options)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("model")
    parser.add_argument("--tasks", type=Path, required=True, help="file of task keys, one a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    result: dict[str, Any] = {"tasks": {}, "texts": 0, "text positions": 0, "images": 0}
    started = time.perf_counter(), time.process_time()
    for key in options.tasks.read_text().split():
        with contextlib.redirect_stderr(io.StringIO()):  # a bar a class list
            model = Model(options.model)
            scores = scorer(key, options.root)(model, options)
        result["tasks"][key] = {
            name: None if value is None or value != value else value for name, value in scores.items()
        }
        result["texts"] += model.texts
        result["text positions"] += model.positions
        result["images"] += model.images
    result |= {"wall": time.perf_counter() - started[0], "cpu": time.process_time() - started[1]}
    names = (
        "torch",
        "torchvision",
        "open_clip_torch",
        "clip-benchmark",
        "webdataset",
        "wilds",
        "scikit-learn",
        "numpy",
    )
    result["versions"] = {"python": platform.python_version(), **{name: version(name) for name in names}}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
