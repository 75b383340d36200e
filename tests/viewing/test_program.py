"""The page's modules become one script, or what cannot be inlined is refused by name."""

from importlib.resources import files
from pathlib import Path

import pytest

from headwise.viewing.program import program

PAGE = files("headwise.viewing") / "assets" / "page"


def written(folder: Path, **sources: str) -> Path:
    for name, source in sources.items():
        (folder / f"{name}.js").write_text(source, encoding="utf-8")
    return folder


def test_a_module_stands_once_behind_those_that_it_imports(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        main='import "./b.js";\nimport {\n  one,\n} from "./a.js";\none();\n',
        b='import { one } from "./a.js";\none();\n',
        a="const hidden = 1;\nexport const one = () => hidden;\nexport class Two {}\n",
        unused="throw new Error();\n",
    )
    script = program(folder)
    places = [script.index(f'modules["{name}.js"] = ') for name in ("a", "b", "main")]
    assert places == sorted(places)
    assert script.count("const hidden") == 1
    assert "return { one, Two };" in script
    assert script.count('one } = modules["a.js"];') + script.count('} = modules["a.js"];') == 3
    assert "unused" not in script and "import" not in script and "export" not in script


@pytest.mark.parametrize(
    "line",
    [
        'import one from "./a.js";',
        'import * as one from "./a.js";',
        'import { one as two } from "./a.js";',
        'import { one } from "a";',
        'import { one } from "../a.js";',
        "import { one } from './a.js';",
        "export default one;",
        "export let one = 1;",
        "export { one };",
        'export * from "./a.js";',
    ],
)
def test_another_form_of_import_or_export_is_refused(tmp_path: Path, line: str) -> None:
    folder = written(tmp_path, main=f"const first = 1;\n{line}\n", a="export const one = 1;\n")
    with pytest.raises(ValueError, match=r"main\.js has"):
        program(folder)


def test_modules_that_import_one_another_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, main='import "./a.js";\n', a='import "./main.js";\n')
    with pytest.raises(ValueError, match=r"main\.js > a\.js > main\.js"):
        program(folder)


def test_the_page_has_all_its_modules_and_nothing_that_ends_its_script() -> None:
    script = program(PAGE)
    for module in PAGE.iterdir():
        assert f'modules["{module.name}"] = ' in script
    assert "</script" not in script.lower()
    assert "<!--" not in script
