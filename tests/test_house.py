"""The rules that hold the house up, read from the files themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ssacl.config import load_config
from ssacl.sweeps.config import load_sweep

ROOT = Path(__file__).parents[1]
PACKAGES = ("ssacl", "ray_jobs", "serve", "benchmarks", "tests")
FOREIGN = {"ray", "deepspeed", "fastapi", "starlette", "uvicorn", "ray_jobs", "serve"}
CARELESS_NAMES = {"utils.py", "util.py", "misc.py", "helpers.py", "common.py"}
CODE_THAT_UNPICKLES = {"cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MAX_LINES = 400
# Prompts are no configuration of a run; tests/test_contrast_tasks.py loads them.
RUN_CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.name.startswith(("tune_", "zero_shot"))]


def python_files(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def text_files() -> list[Path]:
    """Files that belong to the project: tracked by git, or all of an unpacked archive."""
    try:
        names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        skipped = re.compile(r"^(\.venv|build|dist|demo_out|runs|\.\w+_cache|\.hypothesis)$|\.egg-info$|__pycache__")
        names = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if path.is_file() and not any(skipped.search(part) for part in path.relative_to(ROOT).parts)
        ]
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    return [path for path in files if b"\0" not in path.read_bytes()[:8192]]


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Top-level package of every import among `nodes`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def at_module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when a module is imported: everything but the bodies of functions, and imports for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (inner for other in node.orelse for inner in (other, *at_module_level(other)))
            continue
        yield node
        yield from at_module_level(node)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_scan_sees_what_it_must() -> None:
    tree = ast.parse(
        "import ray\nfrom serve.app import x\ntry:\n    import deepspeed\nexcept ImportError:\n    pass\n"
        "class A:\n    import fastapi\ndef f():\n    import starlette\nif TYPE_CHECKING:\n    import uvicorn\nfrom . import ray_jobs\n"
    )
    assert set(imports(at_module_level(tree))) == {"ray", "serve", "deepspeed", "fastapi"}
    assert "starlette" in set(imports(ast.walk(tree)))
    assert len(python_files("ssacl")) > 40
    assert len(text_files()) > 60


@pytest.mark.parametrize("path", python_files("ssacl"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_method_is_free_of_ray_and_web(path: Path) -> None:
    tree = parsed(path)
    assert not set(imports(at_module_level(tree))) & FOREIGN
    inside = set(imports(ast.walk(tree))) & FOREIGN
    # The command line may start jobs; an engine, and what builds a divided model for it, may import DeepSpeed when it is asked for; nothing
    # else may, even inside functions.
    is_command = path.parent.name == "commands" or path.name == "cli.py"
    is_training = path.parent.name == "training" or path.name == "divided.py"
    allowed = {"ray", "ray_jobs", "serve", "deepspeed"} if is_command else {"deepspeed"} if is_training else set()
    assert inside <= allowed


def test_every_module_of_the_method_imports_where_ray_and_web_are_absent() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in python_files("ssacl") if path.name != "__main__.py"]
    code = (
        "import sys, importlib\n"
        f"for name in {sorted(FOREIGN)!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(len({modules!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) == len(modules)


def test_only_evaluation_opens_the_truth() -> None:
    reader = re.compile(r"PhantomTruth|decode_truth|ssacl\.evaluation\.truth|purpose=\"evaluation\"")
    users = {str(path.relative_to(ROOT)) for path in python_files("ssacl", "ray_jobs", "serve") if reader.search(path.read_text())}
    outside = {name for name in users if not name.startswith(("ssacl/evaluation/", "ssacl/phantom/"))}
    assert outside == set()
    assert "ssacl/evaluation/truth.py" in users


@pytest.mark.parametrize("path", python_files(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_small_and_named_for_what_they_hold(path: Path) -> None:
    assert path.name not in CARELESS_NAMES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", python_files("ssacl", "serve", "ray_jobs"), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_read_can_run_code(path: Path) -> None:
    tree = parsed(path)
    assert not set(imports(ast.walk(tree))) & CODE_THAT_UNPICKLES
    for node in ast.walk(tree):
        # `import pickle` serves to name the error that torch.load raises, and for nothing else.
        assert not (isinstance(node, ast.ImportFrom) and node.module == "pickle"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", f"line {node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load":
            assert given.get("weights_only") == "True", f"line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        assert called not in ("yaml.load", "yaml.unsafe_load", "eval", "exec"), f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("tune_*.yaml")), ids=lambda path: path.name)
def test_every_shipped_sweep_loads(path: Path) -> None:
    assert load_sweep(path).config.space


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_and_comes_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config
    unknown = yaml.safe_load(path.read_text())
    assert set(unknown) <= {"data", "model", "losses", "optim", "engine", "run"}


def test_there_are_configurations() -> None:
    assert RUN_CONFIGS


def test_no_path_of_a_machine_and_no_package_server_in_any_file() -> None:
    # Put together here, so that this file does not hold them.
    roots = ("home/[a-z]", "root/", "work/", "Users/[A-Za-z]", "mnt/[a-z]")
    machine_path = re.compile(r"(?<![\w.<>}/-])/(?:" + "|".join(roots) + ")")
    package_server = re.compile(r"--(?:extra-)?index-url|^\s*index-url\s*=|PIP_(?:EXTRA_)?INDEX_URL\s*=", re.MULTILINE)
    found = []
    for path in text_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for pattern in (machine_path, package_server) for match in pattern.finditer(text)]
    assert found == []


def test_every_file_names_the_same_ray() -> None:
    pin = re.compile(r"\bray(?:\[[\w,]+\])?==([\d.]+)|rayproject/ray(?:-ml)?:([\d.]+)|rayVersion:\s*[\"']?([\d.]+)")
    pins = {
        f"{path.relative_to(ROOT)}: {version}": version
        for path in text_files()
        if path.suffix in (".toml", ".lock", ".txt", ".yaml", ".yml", "") and path.name != "LICENSE"
        for match in pin.finditer(path.read_text(encoding="utf-8", errors="replace"))
        if (version := next(filter(None, match.groups())).rstrip("."))
    }
    assert len(pins) >= 2, "pyproject.toml and requirements.lock both pin Ray"
    assert len(set(pins.values())) == 1, pins


def test_the_repository_has_what_people_look_for() -> None:
    for name in ("README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "docs/ARCHITECTURE.md", "docs/DATA.md", "docs/MODEL_CARD.md"):
        assert (ROOT / name).stat().st_size > 500, name
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.name} -> {target}")
    assert broken == []


def test_hooks_run_the_projects_own_tools() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}
    entries = [hook["entry"] for repository in hooks["repos"] for hook in repository["hooks"]]
    assert any("ruff check" in entry for entry in entries)
    assert any("ruff format" in entry for entry in entries)
    assert any("mypy" in entry for entry in entries)
    assert all(entry.startswith(".venv/bin/") for entry in entries)
