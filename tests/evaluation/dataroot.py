"""A data root in DataComp's formats, one small dataset a task, of solid colours (see colours.py).

What towers that read colours score on it is worked out by hand beside each dataset, in `EXPECTED`. Every image shows a
colour, so its prediction is the class of that colour: yellow shown and called blue is the standing mistake, since blue
is what yellow is least alike.
"""

from __future__ import annotations

from pathlib import Path

from tests.evaluation.colours import COLOURS
from tests.evaluation.formats import (
    labelled,
    npy,
    picture,
    write_captioned_csv,
    write_captioned_wds,
    write_wds,
    write_winogavil_csv,
)

SIX = tuple(COLOURS)  # red green blue yellow pink grey
TEMPLATES = ("a photo of {c}.", "{c} on a {c} ground")
ORDINARY = {  # key → number of classes, at most six here
    "vtab/caltech101": 6,
    "cifar10": 6,
    "vtab/cifar100": 6,
    "vtab/clevr_count_all": 6,
    "country211": 6,
    "vtab/dtd": 6,
    "vtab/eurosat": 6,
    "fgvc_aircraft": 6,
    "food101": 6,
    "gtsrb": 6,
    "imagenet_sketch": 6,
    "imagenetv2": 6,
    "imagenet-a": 6,
    "imagenet-o": 6,
    "imagenet-r": 6,
    "vtab/kitti_closest_vehicle_distance": 4,
    "mnist": 6,
    "objectnet": 6,
    "vtab/flowers": 6,
    "vtab/pets": 6,
    "voc2007": 6,
    "vtab/pcam": 2,
    "renderedsst2": 2,
    "vtab/resisc45": 6,
    "cars": 6,
    "stl10": 6,
    "sun397": 6,
    "vtab/svhn": 6,
}
BY_RECALL = ("vtab/caltech101", "fgvc_aircraft", "vtab/flowers", "vtab/pets")

CLEVR = ("red", "green", "blue", "", "yellow", "pink")  # the blank name is in the data, and is a class
CLEVR_ROWS = [(colour or "grey", label) for label, colour in enumerate(CLEVR)] + [("pink", 0)]

IMAGENET = ("red", "green", "blue", "yellow", "red", "pink", "grey")  # two classes of one name, as ImageNet has
IMAGENET_ROWS = [(colour, label) for label, colour in enumerate(IMAGENET) if label != 4] + [("yellow", "blue")]

# location, sequence, year, month, day, hour, minute, second, y, domain
_CAMERA = (3, 0, 2013, 5, 6, 7, 8, 9, 0, 0)
IWILDCAM_ROWS = [
    ("red", "red", *_CAMERA),
    ("red", "red", *_CAMERA),
    ("pink", "red", *_CAMERA),
    ("green", "green", *_CAMERA),
    ("blue", "blue", *_CAMERA),
    ("yellow", "blue", *_CAMERA),
]
CAMELYON_ROWS = [  # hospital, slide, y, domain; no patch of slide 1
    ("red", "red", 2, 0, 0, 0),
    ("blue", "blue", 2, 0, 1, 0),
    ("blue", "blue", 2, 2, 1, 0),
    ("red", "blue", 2, 2, 1, 0),
]
FMOW_ROWS = [  # region, year, y, domain; no image of region 2; region 5 is the one called Other
    ("red", "red", 0, 16, 0, 0),
    ("green", "green", 1, 16, 1, 0),
    ("yellow", "blue", 1, 17, 2, 0),
    ("pink", "pink", 3, 17, 4, 0),
    ("grey", "grey", 4, 17, 5, 0),
    ("yellow", "blue", 5, 17, 2, 0),
]
DOLLAR_ROWS = [  # income_ds, income_meta, region; no image of income 2
    ("red", "red", 0, 100, 1),
    ("pink", "grey", 0, 200, 1),
    ("yellow", "blue", 1, 300, 2),
    ("yellow", "yellow", 1, 300, 2),
    ("green", "green", 3, 900, 0),
]
GEODE_ROWS = [  # region, country; no image of region 1
    ("red", "red", 0, 7),
    ("green", "green", 2, 9),
    ("pink", "grey", 2, 9),
    ("blue", "blue", 2, 9),
    ("grey", "grey", 3, 2),
]

RARE = "red and green and green and green and blue"  # none of the faces comes near it
FACE_CLASSES = {
    "age": (*SIX, "red and blue", "green and blue", RARE),
    "gender": ("red and green and green", "blue"),
    "race": ("green", "red", "blue", "yellow", "pink", "grey", RARE),
    "toxic": ("red", *[RARE] * 13, "green", RARE, RARE, RARE, "blue", RARE, RARE),
}
FACE_TEMPLATES = ("age:a photo of a person {c} years old", "gender:a photo of a {c}", "race:a photo of a {c} person")
# The shown colour says: red = age 0, gender 0, race 1, person; green = age 1, race 0, non-human; blue = age 2,
# gender 1, race 2, crime. No face is of race 1 here.
FACE_ROWS = [  # colour, then age, gender, race, race_binary
    ("red", 0, 0, 0, 0),
    ("red", 1, 0, 2, 1),
    ("blue", 2, 1, 2, 1),
    ("blue", 2, 0, 0, 1),
    ("green", 1, 0, 2, 1),
]

TEN = (*SIX, "red and blue", "green and blue", "red and red and green", "green and green and blue")
# The caption of the grey image names other colours; the first image has three captions, the second two.
CAPTIONED = [(colour, [f"a {colour} thing"]) for colour in TEN]
CAPTIONED[0][1].extend(["red, and 'nothing' else", "something red"])
CAPTIONED[1][1].append("the green one")
CAPTIONED[5] = ("grey", ["a yellow, yellow and pink wall"])

WINOGAVIL = [
    ("Red", ["red", "green", "blue", "yellow", "grey"], ["red", "yellow"]),
    ("blue", ["grey", "green", "blue", "yellow", "red and blue", "red"], ["blue", "green"]),
    ("pink", list(TEN), ["red", "pink"]),
    ("yellow", [*TEN, "red and red and red and green", "blue and blue and red"], ["yellow"]),
]


def ordinary_rows(number: int, classes: int) -> list[tuple[str, str]]:
    """Every class right once, `number` mod 4 times yellow called blue, `number` div 4 times pink called grey."""
    rows = [(colour, colour) for colour in _some(classes)]
    return rows + [("yellow", "blue")] * (number % 4) + [("pink", "grey")] * (number // 4 if classes == 6 else 0)


def _some(classes: int) -> tuple[str, ...]:
    return SIX if classes == 6 else ("yellow", "blue", "red", "green")[:classes]


SAMPLES = {
    **{key: len(ordinary_rows(i, classes)) for i, (key, classes) in enumerate(ORDINARY.items())},
    "vtab/clevr_closest_object_distance": len(CLEVR_ROWS),
    "imagenet1k": len(IMAGENET_ROWS),
    "wilds/iwildcam": len(IWILDCAM_ROWS),
    "wilds/camelyon17": len(CAMELYON_ROWS),
    "wilds/fmow": len(FMOW_ROWS),
    "fairness/dollar_street": len(DOLLAR_ROWS),
    "fairness/geode": len(GEODE_ROWS),
    "fairness/fairface": len(FACE_ROWS),
    "fairness/utkface": len(FACE_ROWS),
    "retrieval/flickr_1k_test_image_text_retrieval": len(CAPTIONED),
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": len(CAPTIONED),
    "misc/winogavil": len(WINOGAVIL),
}


def write_data_root(root: Path) -> None:
    """All forty tasks: Flickr in CLIP_benchmark's layout, MSCOCO and WinoGAViL as their raw files; and their sizes."""
    (root / "sizes.toml").write_text("".join(f'"{key}" = {size}\n' for key, size in SAMPLES.items()), encoding="utf-8")
    for number, (key, classes) in enumerate(ORDINARY.items()):
        names = _some(classes)
        samples = labelled(ordinary_rows(number, classes), names)
        write_wds(root, key, samples, classes=names, templates=TEMPLATES, shards=1 + number % 3)
    clevr, imagenet = "vtab/clevr_closest_object_distance", "imagenet1k"
    write_wds(root, clevr, labelled(CLEVR_ROWS, CLEVR), classes=CLEVR, templates=("clevr shapes at {c}",))
    write_wds(root, imagenet, labelled(IMAGENET_ROWS, IMAGENET), classes=IMAGENET, templates=TEMPLATES, shards=2)
    grouped = {
        "wilds/iwildcam": IWILDCAM_ROWS,
        "wilds/camelyon17": CAMELYON_ROWS,
        "wilds/fmow": FMOW_ROWS,
        "fairness/dollar_street": DOLLAR_ROWS,
        "fairness/geode": GEODE_ROWS,
    }
    for key, rows in grouped.items():
        names = ("red", "blue") if key == "wilds/camelyon17" else SIX
        write_wds(root, key, labelled(rows, names), classes=names, templates=TEMPLATES, shards=2)
    for key in ("fairness/fairface", "fairness/utkface"):
        samples = [{"jpg": picture(colour, "jpg"), "npy": npy(row)} for colour, *row in FACE_ROWS]
        names = [f"{objective}:{name}" for objective, group in FACE_CLASSES.items() for name in group]
        write_wds(root, key, samples, classes=names, templates=(*FACE_TEMPLATES, "toxic:a photo of a {c}"))
    write_captioned_wds(root, "retrieval/flickr_1k_test_image_text_retrieval", CAPTIONED, shards=2)
    coco = root / "mscoco_2014_5k_test_image_text_retrieval"
    write_captioned_csv(coco, "test_5k_mscoco_2014.csv", "images_mscoco_2014_5k_test", CAPTIONED)
    pool = {name: picture(name, "jpg") for _, candidates, _ in WINOGAVIL for name in candidates}
    write_winogavil_csv(root / "winogavil", WINOGAVIL, pool)


def _ordinary_scores(number: int, key: str, classes: int) -> dict[str, float | None]:
    wrong, near = number % 4, number // 4 if classes == 6 else 0
    n = classes + wrong + near
    recalls = [1.0] * (classes - 2) + [1 / (1 + wrong), 1 / (1 + near)]  # of blue and grey
    scores = {"acc1": classes / n, "acc5": (classes + near) / n if classes >= 5 else None}
    scores["mean_per_class_recall"] = sum(recalls) / classes
    return scores | {"main_metric": scores["mean_per_class_recall" if key in BY_RECALL else "acc1"]}


_FACES = {
    # red is race 1, which stands for race_binary 0, and right for the first; of the other four the red one is wrong
    "acc_race_race_binary:0": 1.0,
    "acc_race_race_binary:1": 3 / 4,
    "acc_race_avg": 4 / 5,
    "acc_age_race_binary:0": 1.0,
    "acc_age_race_binary:1": 3 / 4,
    "acc_age_avg": 4 / 5,
    # the one of blue who is of gender 0 is taken for gender 1
    "acc_gender_race_binary:0": 1.0,
    "acc_gender_race_binary:1": 3 / 4,
    "acc_gender_avg": 4 / 5,
    "acc_gender_x_race:0_gender:0": 1 / 2,
    "acc_gender_x_race:2_gender:0": 1.0,
    "acc_gender_x_race:2_gender:1": 1.0,
    "toxicity_crime_race:0": 1 / 2,
    "toxicity_crime_race:2": 1 / 3,
    "toxicity_nonhuman_race:0": 0.0,
    "toxicity_nonhuman_race:2": 1 / 3,
    "main_metric": None,
}
_CAPTIONED = {
    # 13 captions: the grey image's own finds yellow .988, red-red-green .968, pink .933 and then grey .876
    "image_retrieval_recall@1": 12 / 13,
    "image_retrieval_recall@5": 1.0,
    "image_retrieval_recall@10": 1.0,
    # the grey image finds pink's caption, .933, before its own; all others find their own
    "text_retrieval_recall@1": 9 / 10,
    "text_retrieval_recall@5": 1.0,
    "text_retrieval_recall@10": 1.0,
    "mean_recall@1": (12 / 13 + 9 / 10) / 2,
    "main_metric": (12 / 13 + 9 / 10) / 2,
}
EXPECTED: dict[str, dict[str, float | None]] = {
    **{key: _ordinary_scores(i, key, classes) for i, (key, classes) in enumerate(ORDINARY.items())},
    # six of seven: the last pink is called red, of which pink is fourth (pink, grey, yellow, red; the blank is grey)
    "vtab/clevr_closest_object_distance": {
        "acc1": 6 / 7,
        "acc5": 1.0,
        "mean_per_class_recall": (5 + 1 / 2) / 6,
        "main_metric": 6 / 7,
    },
    # the second class of the name red has no image; yellow's first five of seven: yellow pink grey red red
    "imagenet1k": {
        "acc1": 6 / 7,
        "acc5": 6 / 7,
        "mean_per_class_recall": (5 + 1 / 2) / 6,
        "main_metric": 6 / 7,
    },
    # F1 of red 4/5 (precision 1, recall 2/3), green 1, blue 2/3 (1, 1/2); pink and yellow are predicted, never true
    "wilds/iwildcam": {
        "acc1": 4 / 6,
        "acc_avg": 4 / 6,
        "F1-macro_all": (4 / 5 + 1 + 2 / 3) / 3,
        "recall-macro_all": (2 / 3 + 1 + 1 / 2) / 3,
        "main_metric": (4 / 5 + 1 + 2 / 3) / 3,
    },
    "wilds/camelyon17": {
        "acc1": 3 / 4,
        "acc5": None,
        "acc_slide:0": 1.0,
        "acc_slide:1": None,
        "acc_slide:2": 1 / 2,
        "count_slide:1": 0,
        "acc_wg": 1 / 2,
        "main_metric": 3 / 4,
    },
    "wilds/fmow": {
        "acc1": 4 / 6,
        "acc_worst_year": 2 / 4,
        "acc_region:0": 1.0,
        "acc_region:1": 1 / 2,
        "acc_region:2": None,
        "acc_region:5": 0.0,
        "acc_worst_region": 0.0,
        "acc_worst_region_no_other": 1 / 2,
        "main_metric": 0.0,
    },
    # called grey, pink is in its first five; called blue, yellow is not
    "fairness/dollar_street": {
        "acc1": 3 / 5,
        "acc5": 4 / 5,
        "acc_top5_avg": 4 / 5,
        "acc_top5_income_ds:0": 1.0,
        "acc_top5_income_ds:1": 1 / 2,
        "acc_top5_income_ds:2": None,
        "acc_top5_income_ds:3": 1.0,
        "acc_top5_wg": 1 / 2,
        "main_metric": 1 / 2,
    },
    "fairness/geode": {
        "acc1": 4 / 5,
        "acc_avg": 4 / 5,
        "acc_region:0": 1.0,
        "acc_region:1": None,
        "acc_region:2": 2 / 3,
        "acc_region:3": 1.0,
        "acc_wg": 2 / 3,
        "main_metric": 2 / 3,
    },
    "fairness/fairface": _FACES,
    "fairness/utkface": _FACES,
    "retrieval/flickr_1k_test_image_text_retrieval": _CAPTIONED,
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": _CAPTIONED,
    # red and yellow: 1. Blue, then red-and-blue .707, grey .577: one of three. Pink, then grey .933 before red: one of
    # three. Yellow: 1.
    "misc/winogavil": {
        "avg_jaccard_score": (1 + 1 / 3 + 1 / 3 + 1) / 4,
        "jaccard_score_5": 1.0,
        "jaccard_score_6": 1 / 3,
        "jaccard_score_10": 1 / 3,
        "jaccard_score_12": 1.0,
        "jaccard_score_5-6": 2 / 3,
        "jaccard_score_10-12": 2 / 3,
        "main_metric": 2 / 3,
    },
}
