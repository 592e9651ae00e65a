"""Images a second and core: this package's loader beside open_clip's own, over the same shards in the same run.

    python -m venv open-clip
    open-clip/bin/pip install open_clip_torch==3.3.0 "webdataset<=0.2.86" pandas scikit-learn
    python benchmarks/loader.py --open-clip-python open-clip/bin/python

open_clip 3.3 trains with webdataset up to 0.2.86 only (it crashes on later ones), so it runs in an environment of its
own. Both loaders read one set of shards of 500×375 JPEGs (quality 90, cut from real photographs: the two that
scikit-learn ships, or those in `--photos`), and one of the same at 256 pixels on the short side. Both crop 90–100 % to
224 pixels and tokenise the captions, with one worker process, parent and worker pinned to one core. Passes alternate;
the ratio is the median over pairs. CPU time stands beside wall time: on a machine that does other work it is the fairer
of the two.

Ours hands over uint8 images, which are normalised on the device; open_clip's are normalised float32.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SIZE, BATCH, SHARDS = 224, 256, 4
SETS = {"500x375": (500, 375), "341x256": (341, 256)}
LOADERS = ("open_clip", "ours", "ours, Pillow only")
WORDS = (
    "a the of in on with and young old small red blue green wooden street house river mountain woman man children dog "
    "cat tree garden night summer photograph portrait view city boat harbour kitchen table flowers stadium festival"
)


# --- the shards ---------------------------------------------------------------------------------------------------


def write_shards(folder: Path, photos: Path, samples: int) -> None:
    """Crops of photographs with captions of 5 to 20 words, as they are and at 256 pixels on the short side."""
    import numpy as np
    from PIL import Image

    opened = [Image.open(path).convert("RGB") for path in sorted(photos.iterdir()) if path.suffix in (".jpg", ".png")]
    large = [image for image in opened if image.width >= 500 and image.height >= 375]
    if not large:
        raise SystemExit(f"{photos}: no photograph of at least 500×375 pixels")
    draw, words = np.random.default_rng(0), WORDS.split()
    tars = {}
    for name in SETS:
        (folder / name).mkdir()
        tars[name] = [
            tarfile.open(folder / name / f"{shard:05d}.tar", "w")  # noqa: SIM115 (closed below)
            for shard in range(SHARDS)
        ]
    for number in range(samples):
        image = large[number % len(large)]
        left, top = draw.integers(image.width - 499), draw.integers(image.height - 374)
        crop = image.crop((left, top, left + 500, top + 375))
        caption = " ".join(draw.choice(words, draw.integers(5, 21))).encode()
        for name, size in SETS.items():
            file = io.BytesIO()
            crop.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
            for suffix, data in (("jpg", file.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tars[name][number * SHARDS // samples].addfile(member, io.BytesIO(data))
    for tar in (tar for group in tars.values() for tar in group):
        tar.close()


# --- in the measured process: one loader, driven by lines on standard input -----------------------------------------


def serve(loader: str, shards: Path, samples: int) -> None:
    """Answer `pass` with the cost of one epoch and `parts` with that of each step, as lines of JSON."""
    import torch

    torch.set_num_threads(1)
    batches, parts, versions = (open_clip_loader if loader == "open_clip" else own_loader)(loader, shards, samples)
    answers = {"pass": lambda: one_pass(batches), "parts": parts, "versions": lambda: versions}
    for line in sys.stdin:
        print("\n" + json.dumps(answers[line.strip()]()), flush=True)


def one_pass(batches: Callable[[], Iterable[Any]]) -> dict[str, float]:
    wall, cpu, images = time.perf_counter(), cpu_seconds(), 0
    for batch in batches():
        images += len(batch)
    return {"images": images, "wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}


def cpu_seconds() -> float:
    """Of this process and its workers."""
    ticks = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def own_loader(loader: str, shards: Path, samples: int) -> tuple[Callable, Callable, dict]:
    import torch

    from disttempnet.data import EpochPlan, PairDataset, PlanSampler, make_loader, open_index
    from disttempnet.data import augment as transforms
    from disttempnet.data import images as decoding
    from disttempnet.models.towers import open_clip

    if loader == "ours, Pillow only":
        decoding.simplejpeg = None
    elif decoding.simplejpeg is None:
        raise SystemExit("simplejpeg is missing: pip install 'disttempnet[fast]'")
    index = open_index(str(shards), progress=False)
    plan = EpochPlan(index, BATCH, lanes=1, seed=0, tail="drop")
    dataset = PairDataset(index, transforms.train_transform("open_clip", SIZE), seed=0)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    batches = make_loader(dataset, PlanSampler(plan), tokenizer, workers=1)

    def parts() -> dict[str, float]:
        draw, augment = transforms.Random(0), transforms.SmallRandAugment()
        clock = Clock(min(BATCH, samples // SHARDS))
        data = clock.each("read", index.image_bytes, range(clock.samples))
        images = clock.each("decode", lambda d: decoding.EncodedImage(d).pixels(), data)
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        boxes = [transforms.random_box(*size, 0.9, draw) for size in sizes]
        cuts = list(zip(images, sizes, boxes, strict=True))
        crops = clock.each("crop and resize", lambda cut: transforms.resized_crop(*cut, SIZE), cuts)
        captions = clock.each("read", lambda n: index.captions(n)[0], range(clock.samples))
        clock.each("tokenise", tokenizer, [captions])
        clock.each("collate", torch.stack, [crops])
        clock.each("(flip and RandAugment, where chosen)", lambda x: augment(x.flip(2), draw), crops)
        return clock.microseconds

    return lambda: (batch.ids for batch in batches), parts, versions("simplejpeg")


def open_clip_loader(loader: str, shards: Path, samples: int) -> tuple[Callable, Callable, dict]:
    import open_clip
    import torch
    from open_clip_train.data import get_wds_dataset
    from PIL import Image

    args = SimpleNamespace(
        train_data=str(shards / f"{{00000..{SHARDS - 1:05d}}}.tar"),
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        workers=1,
        world_size=1,
    )
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = open_clip.image_transform(SIZE, is_train=True, mean=mean, std=std)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)

    def decode(encoded: bytes) -> Image.Image:
        return Image.open(io.BytesIO(encoded)).convert("RGB")

    def parts() -> dict[str, float]:
        clock = Clock(min(BATCH, samples // SHARDS))
        with tarfile.open(shards / "00000.tar") as tar:
            members = tar.getmembers()[: 2 * clock.samples]
            contents = clock.each("read", lambda m: tar.extractfile(m).read(), members)
        images = clock.each("decode", decode, contents[0::2])
        crop, *rest = transform.transforms
        images = clock.each("crop and resize", crop, images)
        for step in rest:
            images = clock.each("to normalised float32", step, images)
        clock.each("tokenise", lambda text: tokenizer(text.decode())[0], contents[1::2])
        clock.each("collate", torch.stack, [images])
        return clock.microseconds

    return lambda: (texts for _, texts in data.dataloader), parts, versions("webdataset")


class Clock:
    """CPU microseconds a sample, by step."""

    def __init__(self, samples: int) -> None:
        self.samples, self.microseconds = samples, dict[str, float]()

    def each(self, step: str, action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        begin = time.process_time()
        results = [action(item) for item in items]
        spent = (time.process_time() - begin) / self.samples * 1e6
        self.microseconds[step] = self.microseconds.get(step, 0.0) + spent
        return results


def versions(*more: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "open_clip_torch", "pillow", "numpy", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# --- the comparison ------------------------------------------------------------------------------------------------


class Served:
    """A measured loader in a process of its own, on one core."""

    def __init__(self, python: str, loader: str, shards: Path, samples: int, core: int) -> None:
        command = [python, __file__, "--serve", loader, str(shards), str(samples)]
        pinned = lambda: os.sched_setaffinity(0, {core})  # noqa: E731
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, preexec_fn=pinned, env=environment)

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args}: ended with exit code {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare(options: argparse.Namespace, shards: Path) -> dict[str, Any]:
    pythons = {"open_clip": options.open_clip_python}
    served = {
        loader: Served(pythons.get(loader, sys.executable), loader, shards, options.samples, options.core)
        for loader in LOADERS
    }
    passes: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
    parts: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
    for number in range(options.pairs + 1):
        for loader, process in served.items():
            cost, steps = process.ask("pass"), process.ask("parts")
            if number:  # the first warms up
                passes[loader].append(cost)
                parts[loader].append(steps)
        print(".", end="", file=sys.stderr, flush=True)
    result: dict[str, Any] = {}
    for loader in LOADERS:
        result[loader] = {
            f"images_per_{kind}_second": round(statistics.median(p["images"] / p[kind] for p in passes[loader]), 1)
            for kind in ("wall", "cpu")
        }
        for kind in ("wall", "cpu"):
            pairs = zip(passes[loader], passes["open_clip"], strict=True)
            ratio = statistics.median(ours["images"] / ours[kind] / (t["images"] / t[kind]) for ours, t in pairs)
            result[loader][f"times_open_clip_{kind}"] = round(ratio, 2)
        steps = {step: statistics.median(p[step] for p in parts[loader]) for step in parts[loader][0]}
        result[loader]["microseconds"] = {step: round(value) for step, value in steps.items()}
        result[loader]["versions"] = served[loader].ask("versions")
        served[loader].close()
    return result


def show(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}\n| loader | images/s of CPU time | of wall time | × open_clip (CPU) | (wall) |")
    print("|---|---|---|---|---|")
    for loader in LOADERS:
        r = result[loader]
        print(
            f"| {loader} | {r['images_per_cpu_second']:.0f} | {r['images_per_wall_second']:.0f} "
            f"| {r['times_open_clip_cpu']:.2f} | {r['times_open_clip_wall']:.2f} |"
        )
    for loader in LOADERS:
        steps = result[loader]["microseconds"]
        total = sum(value for step, value in steps.items() if not step.startswith("("))
        print(f"{loader}, µs a sample: " + ", ".join(f"{s} {v} ({v / total:.0%})" for s, v in steps.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-clip-python", required=True, help="interpreter of the environment with open_clip 3.3")
    parser.add_argument("--photos", type=Path, help="folder of photographs; default: the two of scikit-learn")
    parser.add_argument("--samples", type=int, default=1024, help=f"images a pass, a multiple of {BATCH}")
    parser.add_argument("--pairs", type=int, default=7, help="passes of each loader")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="core that all is pinned to")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args()
    photos = options.photos
    if photos is None:
        where = "import sklearn.datasets as d; print(d.__path__[0] + '/images')"
        command = [options.open_clip_python, "-c", where]
        photos = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    results: dict[str, Any] = {"samples": options.samples, "pairs": options.pairs, "batch": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), photos, options.samples)
        for name in SETS:
            results[name] = compare(options, Path(folder, name))
            show(name, results[name])
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
