"""Pack folders of webdataset tars into the zip that the package ships: `pack_emoji.py SOURCE_FOLDER OUT.zip`.

SOURCE_FOLDER holds a folder for each split, with .tar shards of images, .txt and .json members. Every shard becomes two
entries of the zip: SPLIT/NAME.images, the concatenated image bytes (stored, as they are compressed already), and
SPLIT/NAME.jsonl (LZMA), one line for each member in tar order: [name, text] or, for an image, [name, number of bytes].
`disttempnet.data.builtin.emoji` restores the same tar. The same input gives the same bytes: order and times are fixed.
"""

import argparse
import json
import tarfile
import zipfile
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".json")


def pack_shard(path: Path) -> tuple[bytes, bytes]:
    """Return (image bytes, member lines) of a tar."""
    images: list[bytes] = []
    lines: list[tuple[str, str | int]] = []
    with tarfile.open(path) as shard:
        for member in shard:
            content = shard.extractfile(member)
            if content is None:
                raise SystemExit(f"{path}: member {member.name} is not a plain file")
            data = content.read()
            if member.name.endswith(TEXT_SUFFIXES):
                lines.append((member.name, data.decode("utf-8")))
            else:
                images.append(data)
                lines.append((member.name, len(data)))
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    return b"".join(images), text.encode("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with one folder of .tar shards a split")
    parser.add_argument("out", type=Path, help="the zip to write")
    arguments = parser.parse_args()
    shards = sorted(arguments.source.glob("*/*.tar"))
    if not shards:
        raise SystemExit(f"{arguments.source}: no SPLIT/NAME.tar inside")
    with zipfile.ZipFile(arguments.out, "w") as archive:
        for path in shards:
            images, lines = pack_shard(path)
            for suffix, data, method in (
                ("images", images, zipfile.ZIP_STORED),
                ("jsonl", lines, zipfile.ZIP_LZMA),
            ):
                entry = zipfile.ZipInfo(f"{path.parent.name}/{path.stem}.{suffix}")  # dated 1980, not now
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, data, method)
    print(f"{arguments.out}: {len(shards)} shards, {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
