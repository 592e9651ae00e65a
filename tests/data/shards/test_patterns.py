"""Patterns: braces expand as in a shell, and impossible ones are refused at once."""

import time

import pytest

from disttempnet.data.shards.patterns import expand_braces
from disttempnet.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..011}", ["008", "009", "010", "011"]),
        ("{0..1}/x{a,b}.tar", ["0/xa.tar", "0/xb.tar", "1/xa.tar", "1/xb.tar"]),
        ("a{b,}c", ["abc", "ac"]),
        ("{00..07..3}", ["00", "03", "06"]),
        ("x{8..12..2}", ["x8", "x10", "x12"]),
        ("{a..e..2}{X..Y}", ["aX", "aY", "cX", "cY", "eX", "eY"]),
        ("{a{1..2},b/{x,y{3,4}}}.tar", ["a1.tar", "a2.tar", "b/x.tar", "b/y3.tar", "b/y4.tar"]),
        ("{{a,b},{c,{d,}}}", ["a", "b", "c", "d", ""]),
        ("a,b{c,d},e", ["a,bc,e", "a,bd,e"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, names: list[str]) -> None:
    """The names are what bash 5.2 prints for `echo PATTERN`."""
    assert list(expand_braces(pattern)) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..999999999}.tar", r"expands to over 1,000,000 names: narrow its ranges"),
        ("{0..999}{0..999}{0..1}", r"expands to over 1,000,000 names"),
        ("{0..9}" * 5000, r"expands to over 1,000,000 names"),
        ("{" * 60 + "a,b" + "}" * 60, "nested over 50 deep"),
        ("{0..99999999999999999999}", r"is no range and no list of names"),
        ("{0..4..0}", r"the range \{0\.\.4\.\.0\} has step 0"),
        ("{a..3}", r"\{a\.\.3\} is no range and no list"),
        ("{e..a}", "runs backwards"),
        ("{-3..3}", "is no range"),
        ("{}", "is no range"),
        ("{{a,b}}", "is no range"),
        ("a}", "a brace has no partner"),
        ("{a,{b,c}", "a brace has no partner"),
    ],
)
def test_patterns_that_stand_for_nothing_are_refused_before_they_are_built(pattern: str, message: str) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=message):
        expand_braces(pattern)
    assert time.process_time() - begun < 0.5
