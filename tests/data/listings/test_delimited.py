"""Tables as people have them: the right captions for the right images, whatever the separator, encoding or quoting."""

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disttempnet.config import SourceConfig
from disttempnet.data import open_source
from disttempnet.data.listings.delimited import DelimitedRows
from disttempnet.data.listings.index import ROW_REASONS
from disttempnet.data.listings.open import Listing
from disttempnet.errors import UserError
from tests.data.conftest import png

COUNT = 24


def opened(path: Path, **settings: Any) -> Listing:
    source = open_source((SourceConfig(path=str(path), **settings),), progress=False)
    assert isinstance(source, Listing)
    return source


def write(folder: Path, name: str, text: str, encoding: str = "utf-8", images: int = COUNT) -> Path:
    for n in range(images):
        (folder / f"{n}.png").write_bytes(png(n))
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def found(source: Listing) -> dict[str, tuple[str, ...]]:
    """Image → captions, of what is usable; its bytes are those of the file that the row names."""
    rows = {source.columns.row(n)[0]: source.captions(n) for n in source.usable.tolist()}
    for n in source.usable.tolist():
        assert source.image_bytes(n) == png(int(source.columns.row(n)[0].removesuffix(".png")))
    return rows


def lines(separator: str, header: Sequence[str], caption: str = "photo {}") -> str:
    rows = [header, *((f"{n}.png", caption.format(n)) for n in range(COUNT))] if header else []
    rows = rows or [(f"{n}.png", caption.format(n)) for n in range(COUNT)]
    return "".join(separator.join(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text", "encoding", "said"),
    [
        ("open_clip.csv", lines("\t", ("filepath", "title"), "a photo, number {}"), "utf-8", "separated by tabs"),
        ("no_commas.csv", lines("\t", ("filepath", "title")), "utf-8", "separated by tabs"),
        ("excel.csv", lines(";", ("filepath", "title"), "one, number {}"), "utf-8-sig", "separated by semicolons"),
        ("excel.csv", "sep=;\n" + lines(";", ("filepath", "title")), "utf-8", "separated by semicolons"),
        ("bars.tsv", lines("|", ("image", "caption"), "one; two, {}"), "utf-8", "separated by bars"),
        ("utf16.csv", lines(",", ("filepath", "title")), "utf-16", "text is UTF-16"),
        ("utf16.tsv", lines("\t", ("filepath", "title"), "größe {}"), "utf-16-le", "text is UTF-16 without a byte-"),
        ("utf16be.txt", lines("\t", ("image", "caption"), "größe {}"), "utf-16-be", "text is UTF-16 without a byte-"),
        ("utf32.csv", lines(",", ("image", "caption"), "größe {}"), "utf-32", "text is UTF-32"),
        ("latin.csv", lines(";", ("image", "caption"), "café größe {}"), "latin-1", "text is Windows-1252 (Latin-1)"),
        ("space.csv", lines(", ", ("filepath", "title")), "utf-8", "separated by commas"),
        ("space.csv", lines(" , ", ("title", "filepath")).replace("title , filepath", "filepath , title"), "utf-8", ""),
        ("upper.csv", lines(",", ("Image", "Caption")), "utf-8", "separated by commas"),
        ("captions.txt", lines(",", ("image", "caption")), "utf-8", "separated by commas"),
        ("captions.txt", lines("\t", ("image", "caption"), "one, {}"), "utf-8", "separated by tabs"),
        ("bare.csv", lines(",", ()), "utf-8", "separated by commas; no header"),
        (
            "bare.csv",
            lines(",", (), "one, and {}"),
            "utf-8",
            "24 rows have separators in their capt",
        ),
        ("bare.tsv", lines("\t", (), "{} comma, bar | and; so on"), "utf-8", "separated by tabs; no header"),
        ("bare.txt", lines("|", ()), "utf-8", "separated by bars; no header"),
        ("mac.csv", lines(",", ("image", "caption")).replace("\n", "\r"), "utf-8", "separated by commas"),
        ("dos.csv", lines(";", ("image", "caption")).replace("\n", "\r\n"), "utf-8", "separated by semicolons"),
        (
            "end.csv",
            lines(",", ("image", "caption")).replace("\n", ",,\n").replace("caption,,", "caption"),
            "utf-8",
            "",
        ),
        (
            "unquoted.csv",
            lines(",", ("image", "caption"), "a, b, {}"),
            "utf-8",
            "24 rows have separators in their capt",
        ),
    ],
)
def test_the_format_is_found(name: str, text: str, encoding: str, said: str, tmp_path: Path) -> None:
    source = opened(write(tmp_path, name, text, encoding))
    body = text.lower().replace("\r\n", "\n").replace("\r", "\n").splitlines()
    last = next(line for line in body if line.startswith("23.png"))
    caption = last.removeprefix("23.png").strip(" ,;|\t")
    assert found(source)["23.png"] == (caption,)
    assert found(source)["0.png"] == (caption.replace("23", "0"),)
    assert len(source) == len(source.usable) == COUNT
    assert said in " ".join(source.notes())


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("a.csv", "18d433a090177c96"),
        ("a.tsv", "18d433a090177c96"),
        ("b.csv", "7b28b09f7643b758"),
        ("c.json", "0aef48475f0a0f65"),
        ("d.jsonl", "c9140291e811abbe"),
    ],
)
def test_what_was_read_before_has_the_digest_that_it_had(name: str, digest: str, tmp_path: Path) -> None:
    captions = ["plain", 'a "quoted" word', "two\nlines, with a comma", " blanks ", '27" screen', "\u00e4\u4f60"]
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    for table, separator in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / table).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(["filepath", "title", " extra"])
            writer.writerows([f"{n}.png", caption, f" {n}"] for n, caption in enumerate(captions))
    odd = b'image,caption\r\n0.png,unquoted 27" screen\r\n\r\n1.png,\xff\r\n2.png\r\n3.png,"a ""b"""\n'
    (tmp_path / "b.csv").write_bytes(odd)
    rows = [{"image": f"{n}.png", "caption": [caption, ""], "id": n} for n, caption in enumerate(captions)]
    (tmp_path / "c.json").write_text(json.dumps([*rows, {"image": "../x", "caption": "c"}]))
    objects = [json.dumps({"file_name": f"{n}.png", "text": caption}) for n, caption in enumerate(captions)]
    (tmp_path / "d.jsonl").write_text("\n".join(objects))
    assert opened(tmp_path / name).digest.startswith(digest)


def test_the_lists_of_flickr(tmp_path: Path) -> None:
    """Rows of one image, in the three forms in which Flickr8k and Flickr30k are passed on."""
    bars, token, comma = "image_name| comment_number| comment\n", "", "image,caption\n"
    for n in range(COUNT):
        for k in range(5):
            text = f"A dog , number {k} of {n} , runs ."
            bars += f"{n}.png| {k}| {text}\n" if (n, k) != (7, 4) else f"{n}.png| {k}   {text}\n"  # as row 19,999 is
            token += f"{n}.png#{k}\t{text}\n"
            comma += f'{n}.png,"{text}"\n'
    texts = {f"{n}.png": tuple(f"A dog , number {k} of {n} , runs ." for k in range(5)) for n in range(COUNT)}
    for name, text in (("Flickr8k.token.txt", token), ("results.token", token), ("captions.txt", comma)):
        source = opened(write(tmp_path, name, text))
        assert found(source) == texts
        assert "120 rows, 24 samples" in source.notes()[1]
    source = opened(write(tmp_path, "results.csv", bars))
    assert found(source) == texts | {"7.png": texts["7.png"][:4]}
    assert source.left_out() == [("fields are not those of the header", 1, ["results.csv:row 40"])]
    assert source.columns.row(0)[2] == {}, "the number of a comment is that of one row"


QUOTED = [
    "plain",
    "the wall, as seen",
    'he said "hi", then left',
    "two\nlines, of one caption",
    "two\nlines\n\nand a blank one",
    '"all of it"',
    'ends in "',
]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_is_quoted_is_read_as_it_was(separator: str, quoting: Any, tmp_path: Path) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, quoting=quoting)
    writer.writerow(["title", "n", "filepath"])
    writer.writerows([caption, n, f"{n}.png"] for n, caption in enumerate(QUOTED))
    source = opened(write(tmp_path, "pandas.csv", file.getvalue(), images=len(QUOTED)))
    assert found(source) == {f"{n}.png": (caption,) for n, caption in enumerate(QUOTED)}
    assert "unbalanced" not in source.notes()[0]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize(
    ("changes", "strays"),
    [
        ({5: '"the wall as seen from the garden', 17: 'a monitor of 27"'}, 1),  # they swallowed the rows between them
        ({5: '"stop" sign on a street'}, 1),
        ({5: '"the wall'}, 1),
        ({5: '"the wall', 6: '"the wall', 23: '"'}, 3),
        ({5: '"', 6: '""no', 7: 'a "b" c', 8: 'a 27" one'}, 2),
    ],
)
def test_a_stray_quotation_mark_costs_nothing(
    separator: str, changes: dict[int, str], strays: int, tmp_path: Path
) -> None:
    captions = [changes.get(n, f"a plain photo number {n}") for n in range(COUNT)]
    text = "".join(f"{n}.png{separator}{caption}\n" for n, caption in enumerate(captions))
    source = opened(write(tmp_path, "lines.csv", f"filepath{separator}caption\n{text}"))
    assert found(source) == {f"{n}.png": (caption,) for n, caption in enumerate(captions)}
    unit = f"{strays} rows with an unbalanced quotation mark are read as they stand, the first is 5.png"
    assert unit in source.notes()[0]


def test_stray_marks_among_quoted_cells(tmp_path: Path) -> None:
    """A file that was quoted, and edited by hand: cells over several lines stay whole."""
    rows = [
        ("0.png", '"two\nlines, of one"', "two\nlines, of one"),
        ("1.png", '"the wall', '"the wall'),
        ("2.png", '"a ""b"", c"', 'a "b", c'),
        ("3.png", '"open\n\nand', '"open'),
        ("4.png", '"quoted, but" not to its end', '"quoted, but" not to its end'),
        ("5.png", '"three\n\nlines"', "three\n\nlines"),
    ]
    text = "image,caption\n" + "".join(f"{image},{cell}\n" for image, cell, _ in rows)
    source = opened(write(tmp_path, "mixed.csv", text))
    assert found(source) == {image: (caption,) for image, _, caption in rows}
    assert source.left_out()[0][:2] == ("fields are not those of the header", 1), "'and' is what is left of row 4"


def test_images_without_a_suffix(tmp_path: Path) -> None:
    text = 'image\tcaption\n0001\t"the wall\n0002\ta 27"\n0003\t"a\nb"\n'
    rows = [row for row in DelimitedRows(io.StringIO(text, newline=""), Path("a.tsv")) if row]
    assert [row["image"] for row in rows] == ["0001", "0002", "0003"]
    assert [row["caption"] for row in rows] == ['"the wall', 'a 27"', "a\nb"]


def test_columns_of_a_table_without_header(tmp_path: Path) -> None:
    text = "".join(f"{n},{n}.png,a photo of {n},{n % 3}\n" for n in range(COUNT))
    assert found(opened(write(tmp_path, "four.csv", text)))["7.png"] == ("a photo of 7",)
    text = "".join(f"{n}.png,un mot {n},one word {n}\n" for n in range(COUNT))
    path = write(tmp_path, "two.csv", text)
    with pytest.raises(
        UserError, match=r"two\.csv: line 1 is not a header, and the caption may be in any of 3 columns"
    ):
        opened(path)
    assert found(opened(path, caption_key="3"))["7.png"] == ("one word 7",)


@pytest.mark.parametrize("form", [json.dumps, repr])
def test_a_cell_can_hold_a_list(form: Any, tmp_path: Path) -> None:
    """As `flickr_annotations_30k.csv` has it, and pandas where a column holds lists."""
    texts = {f"{n}.png": [f"one's {n}", f'"two" {n}', "three, four"] for n in range(COUNT)}
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["raw", "split", "filename"])
    writer.writerows([form(captions), "test", image] for image, captions in texts.items())
    source = opened(write(tmp_path, "annotations.csv", file.getvalue()))
    assert found(source) == {image: tuple(captions) for image, captions in texts.items()}
    assert "a cell is a list of captions" in source.notes()[0]
    assert source.metadata(3) == {"split": "test"}


def test_latin_letters_and_what_only_looks_like_them(tmp_path: Path) -> None:
    """Chinese, Russian or damaged text is left out by name: Windows-1252 would make rubbish of it."""
    for encoding, text in (
        ("gbk", "一只狗在草地上奔跑"),
        ("cp1251", "собака бежит по траве"),
        ("shift-jis", "犬が走る"),
    ):
        path = write(tmp_path, f"{encoding}.csv", lines(",", ("image", "caption"), text) + "0.png,plain\n", encoding)
        assert [reason for reason, *_ in opened(path).left_out()] == ["caption is not UTF-8"]
    path = tmp_path / "mixed.csv"
    path.write_bytes("image,caption\n0.png,größe\n1.png,grö".encode() + b"\xdfe\n")
    assert [ROW_REASONS[code] for code in opened(path).status] == ["ok", "caption is not UTF-8"]


cells = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n\t\0"), max_size=12)


@settings(deadline=None, max_examples=150)
@given(captions=st.lists(cells, min_size=1, max_size=8))
@example(captions=['"', 'a"', "b"])
@example(captions=['"a" b', '"', '"'])
def test_a_table_written_line_by_line_keeps_its_rows(captions: list[str]) -> None:
    text = "image\tcaption\n" + "".join(f"{n}.png\t{caption}\n" for n, caption in enumerate(captions))
    rows = list(DelimitedRows(io.StringIO(text, newline=""), Path("a.tsv")))
    assert [row and row["image"] for row in rows] == [f"{n}.png" for n in range(len(captions))]
    for row, caption in zip(rows, captions, strict=True):
        whole = len(caption) > 1 and caption[0] == caption[-1] == '"' and '"' not in caption[1:-1].replace('""', "")
        assert row is not None
        assert row["caption"] == (caption[1:-1].replace('""', '"') if whole else caption)


many = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)


@settings(deadline=None, max_examples=150)
@given(captions=st.lists(many, min_size=1, max_size=8), separator=st.sampled_from(",\t;|"), last=st.booleans())
def test_a_quoted_table_comes_back(captions: list[str], separator: str, last: bool) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL)
    rows = [("image", "caption"), *((f"{n}.png", caption) for n, caption in enumerate(captions))]
    writer.writerows(row if last else row[::-1] for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(file.getvalue().encode())
        with path.open(encoding="utf-8", newline="") as text:
            read = list(DelimitedRows(text, path))
    assert [row and row["caption"] for row in read] == captions


def misread(seed: int) -> str:
    """A table as csv.writer makes it of captions that look like rows, quote and list; the text, if it is misread."""
    random = Random(seed)
    pieces = [
        "a dog",
        "c.jpg, a dog",
        "3.jpg,two",
        'a 27" screen',
        '"',
        ", ",
        "\n",
        "\n\n",
        " and more",
        "7.jpg\tx",
        "stop",
    ]
    captions = ["".join(random.choices(pieces, k=random.randint(1, 7))) for _ in range(random.randint(4, 12))]
    rows = [("image", "caption"), ("0.jpg", 'a "quoted", first one')]
    rows += [(f"{n}.jpg", caption) for n, caption in enumerate(captions, 1)]
    rows = [row[::-1] for row in rows] if random.random() < 0.5 else rows
    file = io.StringIO()
    separator, end, quoting = random.choice(",\t;|"), random.choice(["\n", "\r\n"]), random.choice([0, 1])
    csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    file.seek(0)
    strict = csv.DictReader(io.StringIO(file.getvalue(), newline=""), delimiter=separator, strict=True)
    # blanks around a caption are no part of it
    read = [row and [*map(str.strip, row.values())] for row in DelimitedRows(file, Path("a.csv"))]
    expected = [[*map(str.strip, row.values())] for row in strict]
    return "" if read == expected else file.getvalue()


def test_what_csv_writes_is_read_as_csv_reads_it() -> None:
    assert not [text for seed in range(200) if (text := misread(seed))]


@pytest.mark.slow
def test_much_that_csv_writes_is_read_as_csv_reads_it() -> None:
    assert not [text for seed in range(200, 3200) if (text := misread(seed))]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_cell_that_lists_images_stays_whole(end: str) -> None:
    """The table has no other quoted cell: what closes it is no row."""
    caption = "a page that lists\nc.jpg, a dog\nand more"
    text = f'image,caption{end}a.jpg,one{end}b.jpg,"{caption}"{end}d.jpg,two{end}'
    rows = list(DelimitedRows(io.StringIO(text, newline=""), Path("a.csv")))
    expected = [("a.jpg", "one"), ("b.jpg", caption), ("d.jpg", "two")]
    assert [row and (row["image"], row["caption"]) for row in rows] == expected


def test_names_that_end_in_a_number_keep_it() -> None:
    """`#N` numbers captions only after the suffix of an image."""
    text = "image,caption\n" + "".join(f"scan#{n},a page {n}\n" for n in range(4))
    assert [row and row["image"] for row in DelimitedRows(io.StringIO(text), Path("a.csv"))] == [
        f"scan#{n}" for n in range(4)
    ]


def test_images_that_a_folder_of_captions_leaves_out_are_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.bmp", "c.GIF", "d.tif", "e.bmp"):
        (tmp_path / name).write_bytes(png(1))
        (tmp_path / name).with_suffix(".txt").write_text(f"a {name}")
    source = opened(tmp_path)
    assert len(source) == 1
    assert "left out: 2 .bmp, 1 .gif, 1 .tif; images beside captions have to be jpeg, jpg, png, webp" in source.notes()


def test_no_note_passes_control_characters_on(tmp_path: Path) -> None:
    text = "image,caption\n" + "".join(f"{n}.png,a {n}\n" for n in range(COUNT))
    text += '\x1b[2Jx.png,"stop" sign\n\x1b[2Jy.png,\n'
    source = opened(write(tmp_path, "odd.csv", text))
    said = [*source.notes(), source.problems(), source.name(COUNT)]
    assert all("\\x1b[2J" in line for line in (said[0], said[-2], said[-1]))
    assert "\x1b" not in "".join(said)
