"""Lines of code per package of headwise: without blank lines, comments and docstrings.

`python packaging/lines.py` prints them and fails above the budget in pyproject.toml, or where a
file has more lines, all counted, than are allowed there.
"""

import ast
import io
import sys
import tokenize
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
_NO_CODE = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
)


def lines_of_code(source: str) -> int:
    r"""How many lines of a file hold code.

    >>> lines_of_code('def f():\n    "Doc."\n\n    return (1,  # one\n        2)\n')
    3
    """
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


def main() -> int:
    """Print the table; 1 where something is above its budget."""
    limits = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["headwise"]
    package, counts, long = ROOT / "src" / "headwise", Counter[str](), []
    for path in sorted(package.rglob("*.py")):
        source, place = path.read_text(encoding="utf-8"), path.relative_to(package)
        counts[place.parts[0] if len(place.parts) > 1 else "(top)"] += lines_of_code(source)
        length = len(source.splitlines())
        if length > limits["lines-of-a-file"]:
            long.append(f"{place} has {length} lines, allowed are {limits['lines-of-a-file']}")
    for name, count in sorted(counts.items()):
        print(f"{count:7,}  {name}")
    total, budget = counts.total(), limits["lines-of-code"]
    print(f"{total:7,}  lines of code in src/headwise, of {budget:,}")
    if total > budget:
        long.append(
            f"src/headwise has {total:,} lines of code, allowed are {budget:,}: make it smaller, "
            "or raise the budget in pyproject.toml and say in the commit what the lines buy"
        )
    for fault in long:
        print(fault, file=sys.stderr)
    return 1 if long else 0


if __name__ == "__main__":
    sys.exit(main())
