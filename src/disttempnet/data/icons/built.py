"""Location of a built icon data set: in the user's cache folder, or in a folder that evaluation is given."""

from __future__ import annotations

from pathlib import Path

from disttempnet.data.builtin.cache import cache_folder
from disttempnet.data.icons.release import SPLITS
from disttempnet.errors import UserError, unknown_name

BUILT = "built:"  # what names of splits begin with, as in data.train = "built:icons/train"
MANIFEST = "icons.json"  # what was built; written last, so a folder that has it is complete


def default_folder() -> Path:
    """Return the folder that `disttempnet data icons` builds by default. Raises UserError: no home folder is known."""
    return cache_folder() / "icons"


def built_split(name: str, root: Path | None = None) -> Path:
    """Folder of Parquet files of a split.

    Args:
        name: `icons/train`, `icons/val` or `icons/val_concepts`.
        root: a folder that was built, or one with such a folder `icons`; without one there the cache is looked into.

    Raises:
        UserError: an unknown name, or nothing is built.
    """
    known = {f"icons/{split}": split for split in SPLITS}
    if name not in known:
        raise UserError(unknown_name("data set", f"{BUILT}{name}", [f"{BUILT}{one}" for one in known]))
    roots = [root, root / "icons"] if root else []
    for folder in [*roots, default_folder()]:
        if (folder / MANIFEST).is_file():
            return folder / known[name]
    raise UserError(
        f"{BUILT}{name}: the icons are not built in {default_folder()}: `disttempnet data icons` builds them once, in "
        "minutes; of a folder that they were built in elsewhere, name OUT/train as data.train and OUT as eval.data_root"
    )


def local_path(spec: str) -> Path:
    """The path that a source names: `built:icons/SPLIT` is a folder, `~` the home folder. Raises UserError."""
    return built_split(spec.removeprefix(BUILT)) if spec.startswith(BUILT) else Path(spec).expanduser()
