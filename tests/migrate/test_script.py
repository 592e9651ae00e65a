"""Scripts are read as bash reads them; what bash would only know while it runs stays visible."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from disttempnet.errors import UserError
from disttempnet.migrate.script import Word, read_script

PLAIN = r"""
a=1 ; b='two words'; c="$a-$b"   # a comment with 'a quote
export D="x y" E=z\ w
ARGS=(--lr 1e-3 --name "a b" $D)
ARGS+=("last one")
show one\
  two --joined\
  --next 'single $a' "double $a \"q\" \$a" mid"dle"'s' "" $c "$c" ${a} ${unset_one:-fallback} "${ARGS[@]}" "${ARGS[*]}"
show {00000..01242}.tar '{0..9}.tar' a#b $EMPTY end
show 1 > /dev/null 2>&1 ; true && show 2 || show 3
"""


def words(text: str, **given: str) -> list[list[str]]:
    return [[word.text for word in command.words] for command in read_script(text, given).commands]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is the oracle")
def test_words_are_those_of_bash() -> None:
    """Braces aside: bash expands them where they are not quoted, and here they are a pattern of shards."""
    oracle = 'show() { printf "%s\\037" "$@" >&3; printf "\\036" >&3; }\nset +B\nEMPTY=\n'
    text = PLAIN.replace("a comment with 'a quote", "a comment")
    run = subprocess.run(["bash", "-c", f"exec 3>&1\n{oracle}{text}"], capture_output=True, text=True, check=True)
    expected = [line.split("\037")[:-1] for line in run.stdout.split("\036")[:-1]]
    found = [line[1:] for line in words(text, EMPTY="") if line[0] == "show"]
    # the shell runs `show 2` and not `show 3`; reading sees both
    assert found[:3] == expected[:3]
    assert found[3:] == [["2"], ["3"]]


def test_a_comment_may_hold_a_quote_and_a_heredoc_commands() -> None:
    text = "# don't\ncat <<EOF > f\npython clip_cc12m.py --no 'x\nEOF\nnext one\n"
    assert words(text)[-1] == ["next", "one"]
    assert read_script(text).commands[-1].line == 5


def test_what_is_not_plain_stays_and_says_why() -> None:
    script = read_script(
        "for lr in 1 2; do\n  if true; then wd=3; fi\n"
        '  go $lr "$wd" $(date) `date` $((1+2)) $1 ${X%%.*} ${Y} done_\ndone\n'
        "read z\nlast $z\n"
    )
    go = next(command for command in script.commands if command.words[0].text == "go")
    assert go.conditional
    unset = [word.unset for word in go.words[1:-1]]
    assert unset == [("$lr",), ("$wd",), ("$(date)",), ("`date`",), ("$((1+2))",), ("$1",), ("${X%%.*}",), ("${Y}",)]
    assert go.words[-1] == Word("done_")
    assert script.why_unset == {
        "lr": "set by a loop",
        "wd": "set in a condition or a loop",
        "z": "read from a file or the terminal",
    }
    assert not script.commands[-1].conditional


def test_given_variables_fill_in_and_the_script_may_set_them_anew() -> None:
    assert words("go $A $B\nA=2\ngo $A", A="1", B="x y") == [["go", "1", "x", "y"], ["go", "2"]]


def test_commands_in_another_shell_are_read() -> None:
    text = "N=4\nsrun -n 8 bash -lc \"cd x && python main.py --n $N\"\nCMD='a b'\neval $CMD c"
    assert words(text)[-2:] == [["srun", "-n", "8", "python", "main.py", "--n", "4"], ["a", "b", "c"]]


def test_directives_end_at_the_first_command() -> None:
    text = "#!/bin/bash\n#SBATCH --time=1:00   # an hour\n#SBATCH -N 4\n\necho\n#SBATCH --nodes=9\n"
    assert read_script(text).directives == ("--time=1:00", "-N", "4")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a 'b", "line 1: a quote '"),
        ('x\na "b', 'line 2: a quote "'),
        ("a $(b", r"line 1: a '\)'"),
        ("A=(1 2", r"'\)'"),
    ],
)
def test_what_is_not_closed_is_named_with_its_line(text: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        read_script(text)
