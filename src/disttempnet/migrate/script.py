"""Shell scripts as bash reads them: words, quotes, variables and #SBATCH lines. Nothing is run.

A variable is filled in where the script sets it plainly: `NAME=value`, `export NAME=value`, `NAME=(words)`. One that
is set in a loop or a condition, by a command, or nowhere stays as it is written, and whoever reads its word learns so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from disttempnet.errors import UserError

NAME = re.compile(r"[A-Za-z_]\w*")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
DIRECTIVE = re.compile(r"#SBATCH\s+(.*)")
DEFAULTED = re.compile(r"([A-Za-z_]\w*)(:?)-(.*)", re.DOTALL)
OPERATORS = (";;", "&&", "||", "&>>", "<<<", "<<-", "<<", ">>", ">&", "<&", "&>", ";", "&", "|", "(", ")", "<", ">")
REDIRECTIONS = {"<", ">", ">>", "<<", "<<-", "<<<", ">&", "<&", "&>", "&>>"}
OPENS, CLOSES = {"if", "for", "while", "until", "case", "select", "{"}, {"fi", "done", "esac", "}"}
PASSED_OVER = {"then", "do", "else", "elif", "!", "time", "exec", "command"}  # before a command
SETS = {"export", "declare", "local", "readonly", "typeset"}
SPEAKS = {"echo", "printf", "cat"}  # what follows is text, no command
DEEPEST_SHELL = 4  # of `bash -c` within `bash -c`


@dataclass(frozen=True)
class Word:
    """A word of a command with its variables filled in.

    Attributes:
        text: the word; what could not be filled in stands in it as in the script.
        unset: these parts, such as `${data}` or `$(hostname)`.
    """

    text: str
    unset: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A simple command.

    Attributes:
        words: its words, without assignments before it and redirections.
        line: of the script, from 1.
        conditional: it stands in a loop, a condition or a function.
    """

    words: tuple[Word, ...]
    line: int
    conditional: bool = False


@dataclass(frozen=True)
class Script:
    """A script, read.

    Attributes:
        commands: in the order of the text.
        directives: the options of its #SBATCH lines, split into words.
        folder: of the last `cd` outside of conditions; empty if there is none.
        why_unset: variable → why it is not filled in, for those that the script does mention.
    """

    commands: tuple[Command, ...]
    directives: tuple[str, ...] = ()
    folder: str = ""
    why_unset: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Piece:
    """A part of a word: literal text, or an expansion by its inner text (`NAME`, `NAME:-x`, `$(…)`)."""

    text: str
    quoted: bool
    expansion: str | None = None


@dataclass(frozen=True)
class _Token:
    """A word by its pieces, an operator, or `NAME=(…)` with the words in `elements`."""

    line: int
    operator: str = ""
    pieces: tuple[_Piece, ...] = ()
    elements: tuple[_Token, ...] | None = None

    @property
    def plain(self) -> str:
        """The text if nothing of it is quoted or expanded, as reserved words are; else empty."""
        whole = all(piece.expansion is None and not piece.quoted for piece in self.pieces)
        return "".join(piece.text for piece in self.pieces) if whole else ""


def read_script(text: str, given: Mapping[str, str] | None = None) -> Script:
    """Read a script.

    Args:
        text: of the script, or one command line.
        given: variables that the environment sets, or that stand for those of a loop or a condition. The script may set
            them anew.

    Raises:
        UserError: a quote or a parenthesis that is not closed.
    """
    reader = _Reader({name: [Word(value)] for name, value in (given or {}).items()})
    reader.read(text.replace("\r\n", "\n"), depth=0)
    return Script(tuple(reader.commands), tuple(_directives(text)), reader.folder, reader.why_unset)


def _directives(text: str) -> Iterator[str]:
    """Yield the words of #SBATCH lines; as sbatch does, only of those before the first command."""
    for line in text.splitlines():
        stripped = line.strip()
        if found := DIRECTIVE.fullmatch(stripped):
            # many write a comment behind the option
            yield from re.split(r"\s#", found[1])[0].replace('"', "").replace("'", "").split()
        elif stripped and not stripped.startswith("#"):
            return


class _Reader:
    """Commands of a script, with the variables that are known so far."""

    def __init__(self, variables: dict[str, list[Word]]) -> None:
        self.given, self.variables, self.commands = dict(variables), variables, list[Command]()
        self.why_unset: dict[str, str] = {}
        self.folder = ""

    def read(self, text: str, depth: int) -> None:
        """Read a text of commands; `depth` counts the shells around it."""
        nested = subshells = 0
        current: list[_Token] = []
        tokens = [*_Lexer(text).tokens(), _Token(0, operator="\n")]
        skipped = False  # the word behind a redirection
        for token in tokens:
            if token.operator in REDIRECTIONS:
                skipped = True
            elif not token.operator:
                if not skipped:
                    current.append(token)
                skipped = False
            else:
                nested = self._command(current, nested, subshells, depth)
                current, skipped = [], False
                subshells = max(0, subshells + {"(": 1, ")": -1}.get(token.operator, 0))

    def _command(self, tokens: list[_Token], nested: int, subshells: int, depth: int) -> int:
        """Read one simple command; returns how many compound commands are open behind it."""
        # Take the reserved words off; of loops only the name of the variable counts.
        while tokens and (tokens[0].plain in OPENS | CLOSES | PASSED_OVER):
            word = tokens.pop(0).plain
            nested = max(0, nested + (word in OPENS) - (word in CLOSES))
            if word in ("for", "select") and tokens:
                self._forget(tokens[0].plain, "set by a loop")
                return nested
            if word == "case":
                return nested
        conditional = bool(nested or subshells)
        if not tokens:
            return nested

        # Assignments alone set variables; before a command they are its environment.
        assignments = 0
        while assignments < len(tokens) and _assigned(tokens[assignments]):
            assignments += 1
        rest = tokens[assignments:]
        if not rest or rest[0].plain in SETS:
            for token in [*tokens[:assignments], *(one for one in rest[1:] if _assigned(one))]:
                self._assign(token, conditional)
            return nested

        words = [word for token in rest for word in self._expanded(token)]
        if not words:
            return nested
        name = words[0].text
        if name == "cd" and len(words) > 1 and not conditional:
            self.folder = words[1].text
        elif name == "unset":
            for variable in words[1:]:
                self._forget(variable.text, "unset")
        elif name == "read":
            for variable in words[1:]:
                self._forget(variable.text, "read from a file or the terminal")
        elif name in SPEAKS:
            pass
        elif (inner := _inner_text(words)) and depth < DEEPEST_SHELL:
            before = len(self.commands)
            self.read(inner, depth + 1)
            # the shell's own prefix (srun, singularity) says how many processes run it
            prefix = tuple(words[: _shell_at(words)])
            self.commands[before:] = [
                Command(prefix + one.words, rest[0].line, conditional or one.conditional)
                for one in self.commands[before:]
            ]
        else:
            self.commands.append(Command(tuple(words), rest[0].line, conditional))
        return nested

    def _assign(self, token: _Token, conditional: bool) -> None:
        found = ASSIGNMENT.match(token.pieces[0].text)
        assert found is not None
        name, append = found[1], bool(found[2])
        if conditional:
            self._forget(name, "set in a condition or a loop")
            return
        if token.elements is not None:
            value = [word for element in token.elements for word in self._expanded(element)]
            self.variables[name] = [*(self.variables.get(name, []) if append else []), *value]
        else:
            first = replace(token.pieces[0], text=token.pieces[0].text[found.end() :])
            value = self._fields((replace(first, quoted=True), *token.pieces[1:]), split=False)
            old = self.variables.get(name, [Word("")])[0] if append else Word("")
            new = value[0] if value else Word("")
            self.variables[name] = [Word(old.text + new.text, (*old.unset, *new.unset))]
        self.why_unset.pop(name, None)

    def _forget(self, name: str, why: str) -> None:
        """Leave a variable open, unless it is given."""
        if name in self.given:
            self.variables[name] = self.given[name]
        else:
            self.variables.pop(name, None)
            self.why_unset[name] = why

    def _expanded(self, token: _Token) -> list[Word]:
        return self._fields(token.pieces, split=True)

    def _fields(self, pieces: Sequence[_Piece], split: bool) -> list[Word]:
        """Return the words that a word's pieces expand to: unquoted variables are split at blanks."""
        fields: list[Word] = []
        text, unset, begun = "", list[str](), False

        def end() -> None:
            nonlocal text, begun
            if begun:
                fields.append(Word(text, tuple(unset)))
            text, begun = "", False
            unset.clear()

        for piece in pieces:
            values = [Word(piece.text)] if piece.expansion is None else self._value(piece)
            for number, value in enumerate(values):
                if number:
                    end()
                parts = [value.text]
                if piece.expansion is not None and not piece.quoted and split and not value.unset:
                    parts = re.split(r"(\s+)", value.text)
                for part in parts:
                    if len(parts) > 1 and part.isspace():
                        end()
                    elif part or piece.quoted:
                        text, begun = text + part, True
                unset.extend(value.unset)
        end()
        return fields

    def _value(self, piece: _Piece) -> list[Word]:
        """Return the value of an expansion: one word, the elements of an array, or the text of what is unknown."""
        inner = piece.expansion or ""
        array = re.fullmatch(r"([A-Za-z_]\w*)\[[@*]\]", inner)
        name = array[1] if array else inner
        if name in self.variables:
            value = self.variables[name]
            if array and inner.endswith("[*]") and piece.quoted:
                unset = tuple(part for one in value for part in one.unset)
                return [Word(" ".join(one.text for one in value), unset)]
            return value if array else value[:1] or [Word("")]
        if defaulted := DEFAULTED.fullmatch(inner):
            known = self.variables.get(defaulted[1])
            if known and (known[0].text or not defaulted[2]):
                return known[:1]
            if not known and defaulted[1] not in self.why_unset:
                return self._fields(_Lexer(defaulted[3]).pieces_to_end(), split=False) or [Word("")]
        return [Word(piece.text, (piece.text,))]


def _assigned(token: _Token) -> bool:
    first = token.pieces[0] if token.pieces else None
    return bool(first and first.expansion is None and not first.quoted and ASSIGNMENT.match(first.text))


def _shell_at(words: Sequence[Word]) -> int:
    """Return the place of a shell that is given a text, or of `eval`; the number of words if there is none."""
    for place, word in enumerate(words):
        name = word.text.rpartition("/")[2]
        if name == "eval" and place == 0:
            return place
        options = [one.text for one in words[place + 1 : place + 3]]
        if name in ("bash", "sh", "zsh") and any(re.fullmatch(r"-[a-z]*c", option) for option in options):
            return place
    return len(words)


def _inner_text(words: Sequence[Word]) -> str:
    """Return the commands in `bash -c TEXT` or `eval TEXT`; empty if this is neither."""
    rest = words[_shell_at(words) :]
    if not rest:
        return ""
    if rest[0].text == "eval":
        return " ".join(word.text for word in rest[1:])
    place = next(number for number, word in enumerate(rest) if re.fullmatch(r"-[a-z]*c", word.text))
    return rest[place + 1].text if len(rest) > place + 1 else ""


class _Lexer:
    """Tokens of a text."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.line = text, 0, 1
        self.heredocs: list[str] = []

    def pieces_to_end(self) -> tuple[_Piece, ...]:
        """Return the whole text as the pieces of one word (a default within `${…}`)."""
        pieces: list[_Piece] = []
        while self.at < len(self.text):
            self._piece(pieces)
        return tuple(pieces)

    def tokens(self, closing: str = "") -> Iterator[_Token]:
        """Yield tokens up to the end, or up to a closing parenthesis."""
        await_heredoc = False
        while self.at < len(self.text):
            character = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self.at, self.line = self.at + 2, self.line + 1
            elif character == "\n":
                yield _Token(self.line, operator="\n")
                self.at, self.line = self.at + 1, self.line + 1
                self._skip_heredocs()
            elif character.isspace():
                self.at += 1
            elif character == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif closing and character == closing:
                return
            elif operator := next((one for one in OPERATORS if self.text.startswith(one, self.at)), ""):
                self.at += len(operator)
                await_heredoc = operator in ("<<", "<<-")
                yield _Token(self.line, operator=operator)
            else:
                token = self._word()
                if await_heredoc:
                    self.heredocs.append("".join(piece.text for piece in token.pieces))
                    await_heredoc = False
                # the number of a stream before its redirection is no word: 2>&1
                if not (token.plain.isdigit() and self.text[self.at : self.at + 1] in ("<", ">")):
                    yield token
        if closing:
            raise UserError(f"the script's line {self.line}: a '{closing}' is missing at the end")

    def _skip_heredocs(self) -> None:
        while self.heredocs:
            wanted = self.heredocs.pop(0)
            while self.at < len(self.text):
                line, _, _ = self.text[self.at :].partition("\n")
                self.at, self.line = min(len(self.text), self.at + len(line) + 1), self.line + 1
                if line.strip() == wanted:
                    break

    def _word(self) -> _Token:
        line, pieces = self.line, list[_Piece]()
        while self.at < len(self.text):
            character = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self.at, self.line = self.at + 2, self.line + 1
                continue
            if character == "(" and len(pieces) == 1 and ASSIGNMENT.fullmatch(pieces[0].text):
                self.at += 1
                elements = tuple(token for token in self.tokens(closing=")") if not token.operator)
                self.at += 1
                return _Token(line, pieces=tuple(pieces), elements=elements)
            if character.isspace() or any(self.text.startswith(one, self.at) for one in OPERATORS):
                break
            self._piece(pieces)
        return _Token(line, pieces=tuple(pieces))

    def _piece(self, pieces: list[_Piece]) -> None:
        """Read the next piece of a word."""
        character = self.text[self.at]
        if character == "\\":
            pieces.append(_Piece(self.text[self.at + 1 : self.at + 2], quoted=True))
            self.at += 2
        elif character == "'":
            pieces.append(_Piece(self._until("'", self.at + 1), quoted=True))
        elif character == '"':
            self._double_quoted(pieces)
        elif character in "$`" and (found := self._expansion()):
            pieces.append(replace(found, quoted=False))
        elif pieces and pieces[-1].expansion is None and not pieces[-1].quoted:
            pieces[-1] = replace(pieces[-1], text=pieces[-1].text + character)
            self._step(character)
        else:
            pieces.append(_Piece(character, quoted=False))
            self._step(character)

    def _step(self, character: str) -> None:
        self.at += 1
        self.line += character == "\n"

    def _until(self, quote: str, start: int) -> str:
        end = self.text.find(quote, start)
        if end < 0:
            raise UserError(f"the script's line {self.line}: a quote {quote} is not closed")
        self.at, inside = end + 1, self.text[start:end]
        self.line += inside.count("\n")
        return inside

    def _double_quoted(self, pieces: list[_Piece]) -> None:
        first, begun, text = self.line, len(pieces), ""
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != '"':
            character = self.text[self.at]
            if character == "\\" and self.text[self.at + 1 : self.at + 2] in ("$", "`", '"', "\\", "\n"):
                escaped = self.text[self.at + 1]
                text += "" if escaped == "\n" else escaped
                self.line += escaped == "\n"
                self.at += 2
            elif character in "$`" and (found := self._expansion()):
                pieces += [_Piece(text, quoted=True)] if text else []
                pieces.append(replace(found, quoted=True))
                text = ""
            else:
                text += character
                self._step(character)
        if self.at >= len(self.text):
            raise UserError(f"the script's line {first}: a quote \" is not closed")
        self.at += 1
        if text or len(pieces) == begun:
            pieces.append(_Piece(text, quoted=True))

    def _expansion(self) -> _Piece | None:
        """Read what begins with $ or `; None if it is that character alone."""
        start, follows = self.at, self.text[self.at + 1 : self.at + 2]
        if self.text[start] == "`":
            self._until("`", start + 1)
            raw = self.text[start : self.at]
            return _Piece(raw, quoted=False, expansion=raw)
        if follows in ("(", "{"):
            self._balanced(follows, {"(": ")", "{": "}"}[follows])
            raw = self.text[start : self.at]
            inner = raw[2:-1] if follows == "{" else raw
            return _Piece(raw, quoted=False, expansion=inner)
        if found := NAME.match(self.text, start + 1):
            self.at = found.end()
            return _Piece(self.text[start : self.at], quoted=False, expansion=found[0])
        if follows and follows in "0123456789@*#?$!-":
            self.at += 2
            raw = self.text[start : self.at]
            return _Piece(raw, quoted=False, expansion=raw)
        return None

    def _balanced(self, opens: str, closes: str) -> None:
        """Move behind the parenthesis that closes the one after $; quotes inside hide others."""
        first, depth = self.line, 0
        self.at += 1
        while self.at < len(self.text):
            character = self.text[self.at]
            if character == "'":
                self._until("'", self.at + 1)
                continue
            depth += (character == opens) - (character == closes)
            self._step(character)
            if character == "\\":
                self.at += 1
            if not depth:
                return
        raise UserError(f"the script's line {first}: a '{closes}' is missing behind ${opens}")
