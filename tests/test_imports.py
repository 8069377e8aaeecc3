"""Who may import whom (and what nothing may do), read off the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "lit_llama").rglob("*.py"))
SCRIPT_FOLDERS = ("finetune", "generate", "scripts", "data")
SCRIPTS = [path for folder in SCRIPT_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
NEEDS_NO_METHOD = (
    "model",
    "train/loss",
    "train/run",
    "generate/decode",
    "data/task",
    "data/samples",
    "data/prompts",
    "train/evaluate",
)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_there_is_something_to_check():
    assert len(PACKAGE) > 10 and len(SCRIPTS) > 8


def test_the_model_imports_torch_alone():
    foreign = {name.split(".")[0] for name in imports(ROOT / "lit_llama" / "model.py")}
    assert foreign == {"__future__", "dataclasses", "math", "typing", "torch", "lit_llama"}
    assert {name for name in imports(ROOT / "lit_llama" / "model.py") if "lit_llama." in name} == {
        "lit_llama.configs",
        "lit_llama.configs.CONFIGS",
        "lit_llama.configs.LLAMA_31_SCALING",
    }


def test_methods_import_the_model_and_no_other_part():
    for path in (ROOT / "lit_llama" / "methods").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("lit_llama")}
        if path.name == "__init__.py":
            continue
        allowed = ["lit_llama.model", "lit_llama.cli", "lit_llama.common"]
        allowed += ["lit_llama.methods.adapter"] * (path.stem == "adapter_v2")
        assert all(name.startswith(tuple(allowed)) for name in ours), (path.name, ours)


def test_no_part_knows_a_method_by_name():
    for stem in NEEDS_NO_METHOD:
        assert not any("methods" in name for name in imports(ROOT / "lit_llama" / f"{stem}.py")), stem
    assert "lit_llama.methods.adapter" not in imports(ROOT / "lit_llama" / "trained.py")


def test_scripts_and_the_package_never_import_scripts():
    script_names = {path.stem for path in SCRIPTS} | {"finetune", "generate", "scripts"}
    for path in PACKAGE + SCRIPTS:
        for name in imports(path):
            assert name.split(".")[0] not in script_names, (path.name, name)


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
