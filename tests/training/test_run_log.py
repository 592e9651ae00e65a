"""Logs of a run: what is skipped, lines that a resumed run writes again, and who is told."""

from __future__ import annotations

import json
from pathlib import Path

from disttempnet.data import Skip
from disttempnet.training.run_log import RunLog, Skipped


def test_skipped_samples_of_every_rank_are_counted_by_reason() -> None:
    skipped = Skipped(3000, 2000)
    broken = [Skip(f"0.tar:at 12: 30: {n:09d}", f"cannot decode image: {n} bytes missing", n) for n in range(25)]
    pixel = Skip("1.tar:7", "one pixel: a placeholder, not an image", 1007)
    lines = [*skipped.add(broken), *skipped.add([pixel, *broken[3:9], pixel])]
    named = [f"skipped 0.tar:at 12: 30: {n:09d}: cannot decode image: {n} bytes missing" for n in range(20)]
    one_in_a_hundred = "skipped so far: {} of 2,000 samples ({} %) unreadable: {} cannot decode image"
    assert lines[:20] == named, "each once, however often it is drawn"
    assert skipped.total == 26
    assert skipped.summary() == one_in_a_hundred.format(26, "1.3", 25) + ", 1 one pixel"
    resumed = Skipped(3000, 2000, skipped.by_reason())
    assert resumed.summary() == skipped.summary()
    again = [Skip("1.tar:8", "one pixel: a placeholder", 1008), pixel]
    assert list(resumed.add(again)) == [], "the first 20 of the run, not more"
    assert (resumed.total, skipped.total) == (27, 26)
    older = {"cannot decode image": 4711}  # draws, as earlier versions counted
    assert Skipped(3000, 2000, older).total == 0
    grown = list(resumed.add(Skip("x", "cannot decode image", n) for n in range(1000)))
    assert [line.partition(" samples")[0] for line in grown] == [
        "skipped so far: 200 of 2,000",
        "skipped so far: 1,000 of 2,000",
    ], "said when it is a tenth, and half"


def test_a_resumed_log_drops_later_and_half_written_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "epoch": step / 10, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "ep']), encoding="utf-8")
    told: list[tuple[int, int, dict[str, float]]] = []
    log = RunLog(tmp_path, 9, 2, True, lambda step, steps, metrics: told.append((step, steps, dict(metrics))))
    log.step(3, 0.3, {"loss": 0.5})
    log.close()
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in read] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert told == [(2, 9, {}), (3, 9, {"loss": 0.5})]


def test_a_log_of_another_rank_writes_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", 9, 0, False)
    log.step(1, 0.1, {"loss": 0.5})
    log.say("text")
    log.evaluation(1, 0.1, {})
    log.close()
    assert list(tmp_path.iterdir()) == []
