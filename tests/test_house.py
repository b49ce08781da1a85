"""The rules of the house: who imports whom, what plugins may know, what is public and in git."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import diffedit

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))
DEMO = "diffedit_demo"
BUILT_IN = sorted(
    path.name for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").exists()
)

# What scripts and plugins outside this repository rely on.
PUBLIC = {
    "API_VERSION",
    "Box",
    "Branch",
    "Contribution",
    "Edit",
    "Editor",
    "Guidance",
    "ImageField",
    "MaskField",
    "ModelField",
    "Pass",
    "Patch",
    "Result",
    "Row",
    "Run",
    "Start",
    "Step",
    "Tokens",
    "Workflow",
    "edits",
    "errors",
    "hookimpl",
}
HOOKS = {
    "pass_finished",
    "pass_started",
    "register_commands",
    "register_edits",
    "register_models",
    "register_preprocessors",
    "step_done",
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- who may import whom -------------------------------------------------------------------------


def test_imports_run_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_contracts_know_every_built_in_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = {c["name"]: c for c in project["tool"]["importlinter"]["contracts"]}
    assert set(project["tool"]["importlinter"]["root_packages"]) == {"diffedit", DEMO, *BUILT_IN}
    assert set(contracts["Plugins do not know each other"]["modules"]) == set(BUILT_IN)
    (core,) = (c for name, c in contracts.items() if name.startswith("The core knows no plugin"))
    assert {DEMO, *BUILT_IN} < set(core["forbidden_modules"])
    (demo,) = (c for name, c in contracts.items() if name.startswith("The demo knows edits only"))
    assert set(BUILT_IN) < set(demo["forbidden_modules"])
    assert set(project["project"]["entry-points"]["diffedit"].values()) == {DEMO, *BUILT_IN}


def imported(tree: ast.Module) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    names = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (["demo", "diffedit", "plugins"], ["train", "gguf", "torchao"]),
        (["tests", "bench"], ["dev", "train"]),
    ],
    ids=["package", "tests"],
)
def test_what_is_imported_is_declared(folders: list[str], extras: list[str]) -> None:
    """What comes in only because another distribution needs it may be gone tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    # pydantic_core is the other half of pydantic, which pins it.
    providers = {**packages_distributions(), "pydantic_core": ["pydantic"]}
    own = {"diffedit", DEMO, "tests", "bench", *BUILT_IN, *sys.stdlib_module_names}
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    undeclared = {
        f"{relative(path)}: {name}"
        for path in modules
        for name in imported(parse(path)) - own
        if not declared & {canonicalize_name(d) for d in providers.get(name, [])}
    }
    assert undeclared == set()


def foreign_names(tree: ast.Module) -> Iterator[str]:
    """What a plugin's module takes from diffedit or from another plugin beyond the public names."""
    allowed = {*diffedit.__all__, "testing"}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    package, _, rest = alias.name.partition(".")
                    if package == "diffedit" and rest not in ("", "testing"):
                        yield f"line {node.lineno}: import {alias.name}"
            case ast.ImportFrom(module="diffedit", names=names, level=0):
                for alias in names:
                    if alias.name not in allowed:
                        yield f"line {node.lineno}: from diffedit import {alias.name}"
            case ast.ImportFrom(module=str(module), level=0) if module.startswith("diffedit."):
                if module != "diffedit.testing":
                    yield f"line {node.lineno}: from {module} import …"
            case ast.Attribute(value=ast.Name(id="diffedit"), attr=name) if name not in allowed:
                yield f"line {node.lineno}: diffedit.{name}"
            case ast.Constant(value=str(text)) if re.fullmatch(r"diffedit(\.\w+)+", text):
                yield f"line {node.lineno}: {text!r}, an import by name"


@pytest.mark.parametrize("path", PLUGINS, ids=relative)
def test_plugins_use_public_names_only(path: Path) -> None:
    assert list(foreign_names(parse(path))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import diffedit.editor",
        "from diffedit.edit import Edit",
        "from diffedit import editor",
        "import diffedit\ndiffedit.sampler.sample",
        "import importlib\nimportlib.import_module('diffedit.models')",
    ],
)
def test_the_rule_on_public_names_finds_offenders(source: str) -> None:
    assert list(foreign_names(ast.parse(source)))


# -- what plugins may know about a model ---------------------------------------------------------

FAMILY = re.compile(
    r"stable.?diffusion|\bsd_?\d|sd_?xl|\bsd_?turbo|flux|kontext|qwen|cogview|kolors|hunyuan|"
    r"pixart|auraflow|unet|transformer.?2d|pipeline",
    re.IGNORECASE,
)
ASKS_TYPE = {"getattr", "hasattr", "isinstance", "issubclass", "type"}


def family_questions(tree: ast.Module) -> Iterator[str]:
    """Where code (docstrings apart) names a model family or asks a model what it is."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                words = [word]
            case ast.keyword(arg=str(word)):
                words = [word]
            case ast.alias(name=word, asname=asname):
                words = [word, asname or ""]
            case ast.ImportFrom(module=str(word)):
                words = [word]
            case ast.Constant(value=str(word)) if id(node) not in docstrings:
                words = [word]
            case _:
                words = []
        line = getattr(node, "lineno", 0)
        yield from (f"line {line}: {word}" for word in words if FAMILY.search(word))
        match node:
            case ast.Call(func=ast.Name(id=asks), args=[subject, *_]) if asks in ASKS_TYPE:
                if re.search(r"\bmodel\b", ast.unparse(subject)):
                    yield f"line {line}: {ast.unparse(node)}"
            case ast.Attribute(value=subject, attr="__class__"):
                yield f"line {line}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", PLUGINS, ids=relative)
def test_no_plugin_asks_for_the_family(path: Path) -> None:
    assert list(family_questions(parse(path))) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f(run):\n    return isinstance(run.model, object)",
        "def f(run):\n    return hasattr(run.model, 'text_encoder_2')",
        "def f(run):\n    return run.model.__class__.__name__",
        "def f(run):\n    return run.model.family == 'sdxl'",
        "def f(run):\n    return run.model.unet",
        "from diffusers import FluxPipeline",
    ],
)
def test_the_rule_on_families_finds_offenders(source: str) -> None:
    assert list(family_questions(ast.parse(source)))


def test_the_rule_on_families_lets_capabilities_pass() -> None:
    source = (
        "def f(run):\n    'Not for Flux.'\n    return 'mask_channels' in run.model.capabilities"
    )
    assert list(family_questions(ast.parse(source))) == []


# -- what is public ------------------------------------------------------------------------------


def kind(name: str) -> tuple[int, str]:
    """Constants first, then classes, then the rest: the order that ruff keeps (RUF022)."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_sorted_and_every_name_is_there() -> None:
    names = list(diffedit.__all__)
    assert names == sorted(names, key=kind)
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(diffedit, name)] == []
    assert set(names) <= set(dir(diffedit))


def test_all_holds_the_public_surface() -> None:
    assert set(diffedit.__all__) >= PUBLIC


def test_all_is_complete() -> None:
    """What `diffedit/__init__.py` defines or imports from its modules is private or in it."""
    bound: set[str] = set()
    for node in ast.walk(parse(ROOT / "diffedit" / "__init__.py")):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if (
                module.split(".")[0] == "diffedit"
            ):
                bound |= {alias.asname or alias.name for alias in names}
    for node in parse(ROOT / "diffedit" / "__init__.py").body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                bound.add(name)
    public = {name for name in bound if not name.startswith("_")}
    assert public - set(diffedit.__all__) == set()


def test_version_is_the_distributions() -> None:
    assert version("diffedit") == diffedit.__version__


def test_built_in_plugins_are_importable_and_typed() -> None:
    assert (ROOT / "diffedit" / "py.typed").exists()
    for name in BUILT_IN:
        assert importlib.import_module(name).__doc__


# -- the hooks -----------------------------------------------------------------------------------


def test_hookspecs_are_the_agreed_ones() -> None:
    functions = {
        node.name: node
        for node in parse(ROOT / "diffedit" / "hookspecs.py").body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(functions) == HOOKS
    assert [name for name, node in functions.items() if not ast.get_docstring(node)] == []
    assert [name for name, node in functions.items() if node.returns is None] == []


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_hook_is_documented(hook: str) -> None:
    assert f"`{hook}" in (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_hook_has_a_test(hook: str) -> None:
    """Some test implements the hook, as a plugin would, and so gets called through it."""
    implemented = {
        node.name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef)
        and any("hookimpl" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    assert hook in implemented


# -- what starts fast ----------------------------------------------------------------------------

HEAVY = {
    "accelerate",
    "cv2",
    "controlnet_aux",
    "diffusers",
    "numpy",
    "torch",
    "torchvision",
    "transformers",
}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["plugins", "list"], ["edit", "--help"]]
)
def test_command_imports_neither_torch_nor_a_plugin(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from diffedit.cli import main\n"
        f"sys.argv = ['diffedit', *{arguments!r}]\n"
        "try:\n    code = main()\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "assert not code, code\n"
        "print('\\n\\x00' + ' '.join(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.rpartition("\x00")
    assert shown.strip()
    heavy = set(modules.split()) & {*HEAVY, *BUILT_IN}
    assert heavy == set()


# -- what is kept in git -------------------------------------------------------------------------


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


# Written so that the patterns do not match themselves.
MACHINE = re.compile(
    r"(?<![\w.:/~-])/(?:home|root|work|Users|mnt|opt|srv|scratch|tmp)/[\w.-]+"
    r"|\b[A-Z]:\\Users\\"
)
REGISTRY = re.compile(
    r"(?:files\.)pythonhosted\.org|\bpypi\.(?:org|python\.org)/simple|\bdownload\.pytorch\.org/whl"
    r"|\bfile:/{2}|--(?:extra-)?index-url|--find-links",
    re.IGNORECASE,
)


def test_no_machine_path_and_no_registry_address_in_git() -> None:
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data[:8192] or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
            found += [
                f"{relative(path)}:{number}: {hit.group()}"
                for pattern in (MACHINE, REGISTRY)
                for hit in pattern.finditer(line)
            ]
    assert found == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE, "see /" + "home/ada/diffedit"),
        (MACHINE, "path = '/" + "opt/wheels'"),
        (REGISTRY, "--extra-" + "index-url x"),
        (REGISTRY, "https://files." + "pythonhosted.org/packages/x"),
        (REGISTRY, "file:" + "///somewhere"),
    ],
)
def test_the_rule_on_addresses_finds_offenders(pattern: re.Pattern[str], text: str) -> None:
    assert pattern.search(text)


def test_no_file_in_git_is_larger_than_16_mb() -> None:
    large = [f"{relative(path)}: {path.stat().st_size}" for path in tracked()]
    assert [line for line in large if int(line.rpartition(" ")[2]) > 16 * 2**20] == []


def test_no_pickle_in_git() -> None:
    assert [
        relative(p)
        for p in tracked()
        if p.suffix in {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
    ] == []


def test_every_edit_stands_in_the_docs_with_what_it_needs() -> None:
    page = (ROOT / "docs" / "edits.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE)
    told = {name: set(re.findall(r"`(\w+)`", needs)) for name, needs in rows}
    known = {name: set(cls.needs) for name, cls in diffedit.edits().items()}
    assert told == known
