"""The order of the package's layers, the size of a script's import closure, and what no file may do."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from helpers import ROOT, SCRIPTS

PACKAGE = sorted((ROOT / "lit_llama").rglob("*.py"))
LAYERS = [  # a part imports from its own layer and the ones before it; scripts import from all of them
    "__init__ common configs",
    "attention",
    "model settings",
    "methods devices checkpoint",
    "tokenizer trained cli base",
    "data",
    "formats",
    "generate",
    "train",
    "measure",
]
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts.split()}


def imports(path: Path) -> set[str]:
    """The names that a file imports, inside functions too: ``from a.b import c`` is a.b and a.b.c."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imported_files(path: Path) -> set[Path]:
    """Those of ``imports`` that are files of this project."""
    places = [ROOT / name.replace(".", "/") for name in imports(path)]
    files = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
    return {file for file in files if file in PACKAGE and file.stat().st_size}


def layer(path: Path) -> int:
    return LAYER_OF[path.relative_to(ROOT / "lit_llama").with_suffix("").parts[0]]  # KeyError: not in LAYERS


def test_layers_import_from_earlier_layers_and_in_no_circle():
    wrong = [(path, file) for path in PACKAGE for file in imported_files(path) if layer(file) > layer(path)]
    assert not wrong, "\n".join(f"{path.relative_to(ROOT)} imports {file.relative_to(ROOT)}" for path, file in wrong)
    TopologicalSorter({path: imported_files(path) for path in PACKAGE}).prepare()  # CycleError shows a circle


def test_a_finetune_script_can_be_read_with_all_that_it_imports():
    closure, new = set(), {ROOT / "finetune/adapter.py"}
    while new:
        closure |= new
        new = {file for path in new for file in imported_files(path)} - closure
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in closure)
    assert len(closure) <= 26 and lines <= 4356, (len(closure), lines)


def test_the_model_imports_torch_alone():
    foreign = {name.split(".")[0] for name in imports(ROOT / "lit_llama/model.py")} - sys.stdlib_module_names
    assert foreign == {"torch", "lit_llama"}


def test_data_and_training_know_no_method():
    for path in PACKAGE:
        if path.parent.name in ("data", "train"):
            assert not any(name.startswith("lit_llama.methods") for name in imports(path)), path


def test_nothing_imports_a_script():
    folders = {path.parent.name for path in SCRIPTS}
    for path in PACKAGE + SCRIPTS:
        assert not folders & {name.split(".")[0] for name in imports(path)}, path


def test_no_path_edits_no_loose_loading_and_no_unpickling():
    for path in PACKAGE + SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert "sys.path" not in text, path
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            function, arguments = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert function not in ("eval", "exec", "pickle.load", "pickle.loads"), path
            assert function != "torch.load" or arguments["weights_only"] == "True", path
            assert not function.endswith("load_state_dict") or "strict" not in arguments, path
