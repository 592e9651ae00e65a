"""Weights inside an installed Python package: `package:MODULE/PATH`, a path inside the package's folder.

Such a source reads the same on every machine, and needs no hub.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from disttempnet.errors import UserError

PACKAGE = "package:"


def package_path(source: str, key: str) -> str:
    """Return the path of a source in a package; any other source as it is. The package is not imported.

    Args:
        source: `package:MODULE/PATH`, a path, or a name.
        key: the config key that named it, for messages.

    Raises:
        UserError: the package is not installed, or has nothing there.
    """
    if not source.startswith(PACKAGE):
        return source
    name, _, inside = source.removeprefix(PACKAGE).partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = f"pip install --no-deps {name.replace('_', '-')}" if name.isidentifier() else "give package:MODULE/PATH"
        raise UserError(f"{key}: {source}: no package '{name}' is installed: {hint}")
    path = Path(next(iter(spec.submodule_search_locations)), inside)
    if not inside or not path.exists():
        raise UserError(f"{key}: {source}: the package holds no such file or folder: {path}")
    return str(path)
