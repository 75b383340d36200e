"""The page's program: its JavaScript modules as one script.

A page that is opened from a disk cannot import modules. So each module becomes a function that
runs once, after those that it imports, and returns what it exports.
"""

import re
from importlib.resources.abc import Traversable

_IMPORT = re.compile(r'^import (?:\{(\s*\w+(?:,\s*\w+)*,?\s*)\} from )?"\./(\w+\.js)";$', re.M)
_EXPORT = re.compile(r"^export (?=(?:const|class|function) (\w+))", re.M)
_LEFT = re.compile(r"^(?:import|export)\b.*", re.M)


def program(folder: Traversable) -> str:
    """The modules in `folder` that `main.js` needs, as one script.

    Raises:
        ValueError: an import or export of another form than `import { name } from "./file.js";`,
            `import "./file.js";` and `export` before const, class or function; or a cycle.
    """
    scripts: dict[str, str] = {}
    _add(folder, "main.js", (), scripts)
    return f'(() => {{\n"use strict";\nconst modules = {{}};\n{"".join(scripts.values())}}})();\n'


def _add(
    folder: Traversable, name: str, importers: tuple[str, ...], scripts: dict[str, str]
) -> None:
    """Add the script of a module behind those that it imports."""
    if name in importers:
        raise ValueError(f"modules import one another: {' > '.join([*importers, name])}")
    if name in scripts:
        return
    source = folder.joinpath(name).read_text(encoding="utf-8")
    for match in _IMPORT.finditer(source):
        _add(folder, match[2], (*importers, name), scripts)
    scripts[name] = _as_function(name, source)


def _as_function(name: str, source: str) -> str:
    exported = [match[1] for match in _EXPORT.finditer(source)]
    body = _EXPORT.sub("", _IMPORT.sub(_taken, source))
    if left := _LEFT.search(body):
        raise ValueError(f"{name} has {left[0]!r}, expected a form that `program` can inline")
    return f'modules["{name}"] = (() => {{\n{body}return {{ {", ".join(exported)} }};\n}})();\n'


def _taken(match: re.Match[str]) -> str:
    names, name = match.groups()
    return f'const {{{names}}} = modules["{name}"];' if names else ""
