"""Every page of `report` in a browser: on a desk and on a phone, light and dark."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from disttempnet.report import write_report
from disttempnet.report.page import open_template
from disttempnet.report.seeds.comparison import compare_groups
from disttempnet.report.seeds.page import comparison_page
from tests.report.browser import assert_readable, needs_browser, rendered
from tests.report.evaluations.records import CLIP, TEMPNET, flat, model_subject, run_subject, write_evaluation
from tests.report.invented import result
from tests.report.synthetic import write_run

LONG = "DistTempNet-v1 with a title that is longer than a phone is wide"


def evaluation_pages(folder: Path) -> dict[str, str]:
    for loss, values in (("clip", CLIP), ("disttempnet-v1", TEMPNET)):
        for seed, value in enumerate(values, 1):
            write_evaluation(folder / f"{loss}--seed-{seed}", flat(value), run_subject(loss, seed))
    partial = write_evaluation(folder / "model", {"mnist": 0.5, "cars": 0.2}, model_subject("laion2b_s34b_b79k" * 3))
    pages = {"evaluations": [folder], "one evaluation": [partial]}
    return {name: write_report(paths, folder / "r.html").read_text(encoding="utf-8") for name, paths in pages.items()}


def seeds_page() -> str:
    made = [
        result(
            loss,
            seed,
            {task: dict.fromkeys(keys, v + 0.01 * seed * v) for task in ("emoji-renderings", "emoji-concepts")},
            batch=batch,
            varied=f"--global_batch-{batch}",
            title=title,
        )
        for loss, title, v in (("clip", "CLIP", 0.2), ("x", LONG, 0.3))
        for batch in (32, 128)
        for seed in (1, 2, 3)
        for keys in [("acc1", "mean_recall", "acc1_head", "acc1_middle", "acc1_tail")]
    ]
    return comparison_page(compare_groups(made))


@needs_browser
def test_every_page_is_readable(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", LONG), write_run(tmp_path / "b", "CLIP", spread=0.0, acc1=0.3)]
    runs = write_report(folders, tmp_path / "runs.html").read_text(encoding="utf-8")
    assert_readable({"runs": runs, "seeds": seeds_page(), **evaluation_pages(tmp_path / "evaluations")})


@needs_browser
def test_pages_of_search_and_classify_are_readable() -> None:
    pixel = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    hit = SimpleNamespace(picture=pixel, name=f"folder/{'x' * 70}.jpg", number=0.3)
    values = {"title": "t", "where": "/data/" + "y" * 80, "model": "runs/a", "unreadable": "z" * 90, "count": 9}
    of_class = {"images": 3, "mean": 0.4, "doubtful": 2, "surest": [hit] * 4, "least_sure": [hit]}
    sections = [SimpleNamespace(name=f"class {'c' * 60}", **of_class)] * 2
    assert_readable(
        {
            "search": open_template("search.html").render(**values, results=[("a red apple " * 9, [hit] * 7)] * 2),
            "classify": open_template("classify.html").render(
                **values, sections=sections, tau="τ is .07", templates=["a photo of {c}"], doubtful=0.5
            ),
        }
    )


@needs_browser
def test_the_check_sees_what_is_wrong() -> None:
    wide = '<body><div class="scroll" style="overflow-x:auto"><i style="display:block;width:9000px">in</i></div>'
    wide += '<b style="display:block;width:900px">out</b><i class="meter" style="display:block;width:9px"></i>'
    wide += '<i class="meter" style="display:block;width:8px"></i><img src="data:image/png;base64,AA=="></body>'
    found = rendered({"page": wide})
    assert found["page", 1400].wide == []
    assert found["page", 420].wide == ["B."]
    assert found["page", 420].scroll > 400
    assert sorted(found["page", 1400].bars) == [8, 9]
    assert found["page", 1400].broken == 1
