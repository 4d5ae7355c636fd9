"""The floors of the house, read from the imports with `ast`, and what no tracked file may hold.

A module may import from the floors below its own folder, and from the modules before it in its folder, whose order is
the line "In order: ..." of the folder's docstring.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import igrpo_jax

ROOT = Path(__file__).parent.parent
PACKAGE = "igrpo_jax"

# Folders and loose modules from the ground up. Those of one floor do not know each other.
FLOORS = [
    ["errors"],
    ["schema", "storage"],
    ["config"],
    ["loading", "records"],
    ["distributed", "rewards"],
    ["data", "cli"],
    ["models"],
    ["sampling", "outputs"],
    ["learning", "evaluation"],
    ["session"],
    ["train"],
    ["__main__", "aot", "report", "main", "evaluate", "generate", "export", "sft"],
    ["probe"],
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
COMMANDS = {
    "__main__",
    "main",
    "evaluate",
    "generate",
    "export",
    "sft",
    "aot/__main__",
    "report/__main__",
    "probe/__main__",
    "rewards/grade",
    "cli/parsing",
    "cli/exits",
}

# Libraries that import jax; importing one is importing it.
IMPORT_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "einshape", "distrax", "rlax"}
# Importing these must leave jax alone: workers import them, and bad input is reported before any device work.
WITHOUT_JAX = (
    *(
        "errors",
        "schema/trees",
        "config",
        "loading",
        "records",
        "cli/parsing",
        "cli/exits",
        "main",
        "evaluate",
        "generate",
        "sft",
        "aot/__main__",
    ),
    *("distributed/preemption", "distributed/watchdog", "distributed/chips", "probe/draft_signal", "probe/__main__"),
)


def order_of(folder, files):
    """Names of the modules of a folder, in the order that its docstring gives them."""
    text = " ".join(
        (ast.get_docstring(ast.parse(files[f"{folder}/__init__"].read_text(encoding="utf-8"))) or "").split()
    )
    return [name.strip() for name in re.search(r"In order: (.*?)\.", text)[1].split(",")]


def allowed(importer, imported, files):
    """Whether a module may import another: of a lower floor, of a folder inside its own, or before it in its own."""
    (own, _, name), (other, _, other_name) = importer.rpartition("/"), imported.rpartition("/")
    if own and own == other:
        order = order_of(own, files)
        return order.index(other_name) < order.index(name)
    if other.startswith(own + "/"):
        return True
    return FLOOR_OF[imported.partition("/")[0]] < FLOOR_OF[importer.partition("/")[0]]


def package_files(root):
    """Module name ("rewards/pool"; "rewards/__init__" for a package) -> file, for every module under `root`."""
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.py"))}


def imports(source, everywhere=True):
    """Dotted names that a source imports, TYPE_CHECKING blocks excepted; without functions unless `everywhere`."""
    names = set()

    def visit(node):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor; write the full name"
            # `from a import b`: b may be a module or a name in a; both are offered, the reader knows which exists.
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source))
    return names


def modules_among(names, files):
    """Those of `names` that are modules of the package, as module names."""
    modules = {name.partition(".")[2].replace(".", "/") for name in names if name.startswith(PACKAGE + ".")}
    return {module for module in modules if module in files}


def has_place(module, files):
    folder, _, name = module.rpartition("/")
    return module.partition("/")[0] in FLOOR_OF and (not folder or name in order_of(folder, files))


def floor_violations(files):
    found = []
    for module, path in files.items():
        if module.endswith("__init__"):
            continue
        if not has_place(module, files):
            found.append(f"{module}: has no place in FLOORS, or in the order of its folder")
            continue
        for other in sorted(modules_among(imports(path.read_text(encoding="utf-8")), files)):
            if has_place(other, files) and not allowed(module, other, files):
                found.append(f"{module} imports {other}, which is not below it")
    return found


def reaches_jax(module, files, everywhere=False, seen=None):
    """The chain of imports from `module` to jax at module level (in functions too with `everywhere`), None if none."""
    seen = set() if seen is None else seen
    seen.add(module)
    names = imports(files[module].read_text(encoding="utf-8"), everywhere)
    for name in sorted(names):
        if name.partition(".")[0] in IMPORT_JAX:
            return f"{module} -> {name}"
    parents = {
        "__init__",
        *(f"{other.rpartition('/')[0]}/__init__" for other in (module, *modules_among(names, files))),
    }
    for other in sorted((modules_among(names, files) | parents) & files.keys() - seen):
        chain = reaches_jax(other, files, everywhere, seen)
        if chain:
            return f"{module} -> {chain}"
    return None


FILES = package_files(ROOT / PACKAGE)


def test_modules_import_only_from_below():
    assert floor_violations(FILES) == []


def test_there_are_no_cycles():
    # Follows from the floors for modules in the table; this one needs no table, and counts imports in functions.
    graph = {module: modules_among(imports(path.read_text(encoding="utf-8")), FILES) for module, path in FILES.items()}
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    assert graph == {}


@pytest.mark.slow
def test_where_jax_is_not_imported():
    for module in FILES:
        if module in WITHOUT_JAX or module.endswith("__init__"):
            assert reaches_jax(module, FILES) is None
        if module.startswith("rewards/"):
            assert reaches_jax(module, FILES, everywhere=True) is None


@pytest.mark.parametrize(
    "module", ["", ".config", ".records", ".rewards.verifier", ".rewards.grade", ".main", ".evaluate"]
)
def test_importing_it_leaves_jax_out(module):
    # The proof of the above on what third parties really import.
    code = f"import sys, {PACKAGE}{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_packages_hold_only_a_docstring_and_the_version():
    for module, path in FILES.items():
        if module.endswith("__init__"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            if module == "__init__":  # the one exception: five public functions, imported where they are first used
                body = [node for node in body if not (isinstance(node, ast.Assign) and is_named(node, "__version__"))]
                body = [node for node in body if not is_of_the_api(node)]
            for node in body:
                is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                assert is_docstring, f"{path}: {ast.unparse(node)}"


def is_named(node, name):
    return ast.unparse(node.targets[0]) == name


def is_of_the_api(node):
    """Whether a statement of igrpo_jax/__init__.py is the table API, or what looks names up in it."""
    if isinstance(node, ast.FunctionDef):
        return node.name in ("__getattr__", "__dir__")
    if isinstance(node, ast.Assign):
        if is_named(node, "__all__"):
            return ast.unparse(node.value) == "[*API]"
        return is_named(node, "API") and len(ast.literal_eval(node.value)) <= 5
    return ast.unparse(node) in ("import importlib", "from typing import Any")


def test_the_public_functions_are_those_of_the_commands_and_cost_nothing_to_name():
    """`import igrpo_jax` brings no module of the package, nor any other library."""
    code = (
        "import sys; before = set(sys.modules); import igrpo_jax; new = set(sys.modules) - before; "
        "print(*sorted({name.partition('.')[0] for name in new} - set(sys.stdlib_module_names))); "
        "print(*sorted(name for name in new if name.startswith('igrpo_jax.'))); "
        "from igrpo_jax import load_config; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "igrpo_jax\n\nFalse\n", done.stdout + done.stderr
    for name, (module, function) in igrpo_jax.API.items():
        assert name in dir(igrpo_jax) and callable(getattr(igrpo_jax, name))
        file = module.removeprefix("igrpo_jax.").replace(".", "/")
        assert any(
            f"from {module} import {function}" in (text := path.read_text(encoding="utf-8"))
            or f"{module.rpartition('.')[2]}.{function}(" in text
            or (own == file and f" {function}(config" in text)
            for own, path in FILES.items()
            if own in COMMANDS
        ), name
    with pytest.raises(AttributeError, match="no attribute 'trian_model'"):
        _ = igrpo_jax.trian_model


def test_every_folder_with_modules_is_a_package_and_none_is_a_drawer():
    for module, path in FILES.items():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py and would not be installed"
        assert path.name not in ("utils.py", "util.py", "helpers.py", "misc.py", "common.py"), module


@pytest.mark.slow
def test_library_code_does_not_print():
    for module, path in FILES.items():
        calls = [
            node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ]
        assert module in COMMANDS or "print" not in [call.id for call in calls if isinstance(call, ast.Name)], module


def declared_requirements():
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTALL_REQUIRES":
            return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in ast.literal_eval(node.value)}
    raise AssertionError("setup.py: INSTALL_REQUIRES not found")


def test_every_import_is_a_declared_requirement():
    # Caught here although another requirement happens to bring it today.
    distributions = {"absl": "absl-py", "orbax": "orbax-checkpoint", "google": "protobuf"}
    optional = {"libtpu", "matplotlib", "mlflow", "openai", "tokamax", "trackio", "wandb"}
    names = {name.partition(".")[0] for path in FILES.values() for name in imports(path.read_text(encoding="utf-8"))}
    third_party = names - set(sys.stdlib_module_names) - {PACKAGE} - optional
    assert {distributions.get(name, name).lower().replace("_", "-") for name in third_party} <= declared_requirements()


# Folders of one person's or one machine's, and package indexes other than the default. Brackets keep this file clean.
PRIVATE = re.compile(
    r"(?<![\w.])(/[h]ome/\w|/[U]sers/\w|/[r]oot/|[A-Z]:\\[U]sers)"
    r"|(?<![\w.])/[t]mp/\w+/|(?<![\w.])/[w]ork/\w"
    r"|[i]ndex-url|[t]rusted-host|[f]ind-links"
    r"|https?://[^\s/]*([p]ypi|[p]ythonhosted|[a]rtifactory|[n]exus|[r]egistry|[m]irror|[p]roxy)"
)


def tracked_files():
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_tracked_files_name_no_machine():
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in PRIVATE.finditer(text)]
    assert found == []


ORDER = '"""Some folder.\n\nIn order: first, second.\n"""'


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("models/first", "from igrpo_jax.learning import first", "models/first imports learning/first"),
        ("learning/first", "import igrpo_jax.evaluation.first as r", "learning/first imports evaluation/first"),
        ("models/first", "from igrpo_jax.models.second import x", "models/first imports models/second"),
        ("rewards/inner/first", "import igrpo_jax.rewards.first", "rewards/inner/first imports rewards/first"),
        ("config", "def f():\n    from igrpo_jax import train", "config imports train"),  # a lazy import is one too
        ("helper", "", "helper: has no place"),
        ("models/third", "", "models/third: has no place"),
    ],
)
def test_the_floors_catch_what_they_should(tmp_path, module, source, expected):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "order.py").write_text(ORDER)
    files = {"train": tmp_path / "empty.py"}
    for folder in ("models", "learning", "evaluation", "rewards", "rewards/inner"):
        files |= {f"{folder}/__init__": tmp_path / "order.py", f"{folder}/first": tmp_path / "empty.py"}
    files["models/second"] = tmp_path / "empty.py"
    assert floor_violations(files) == []
    files[module] = tmp_path / "guilty.py"
    files[module].write_text(source)
    (message,) = floor_violations(files)
    assert message.startswith(expected)


def test_a_folder_names_the_modules_that_it_has():
    for folder in {path.parent.relative_to(ROOT / PACKAGE).as_posix() for path in FILES.values()} - {"."}:
        here = {module.rpartition("/")[2] for module in FILES if module.rpartition("/")[0] == folder} - {"__init__"}
        assert set(order_of(folder, FILES)) == here, folder
        assert len(here) >= 3, f"{folder}: a folder is for at least three files that share a job"


def test_the_top_shows_the_algorithm():
    loose = {module for module in FILES if "/" not in module} - {"__init__"}
    assert len(loose) <= 12, sorted(loose)


def test_the_road_to_jax_is_found(tmp_path):
    sources = {
        "config": "import json\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax",
        "main": "from igrpo_jax import middle\ndef main():\n    import jax",
        "middle": "try:\n    from igrpo_jax.models.deep import f\nexcept ImportError:\n    pass",
        "models/__init__": "import optax",
        "models/deep": "",
    }
    files = {}
    for module, source in sources.items():
        files[module] = tmp_path / (module.replace("/", "_") + ".py")
        files[module].write_text(source)
    assert reaches_jax("config", files) is None
    assert reaches_jax("main", files) == "main -> middle -> models/__init__ -> optax"
    files["middle"].write_text("")
    assert reaches_jax("main", files) is None
    assert reaches_jax("main", files, everywhere=True) == "main -> jax"


def test_private_names_are_recognised():
    guilty = [
        "/ho" + "me/ann/x",
        "cd /ro" + "ot/x",
        "see /Users/" + "ann",
        "--index-" + "url x",
        "https://mir" + "ror.x.org/",
    ]
    assert all(PRIVATE.search(text) for text in guilty)
    innocent = [
        "DIR/home/x",
        "runs/work",
        "https://www.apache.org/licenses/",
        "/path/to/model",
        "~/.cache",
        "homework/w",
    ]
    assert not any(PRIVATE.search(text) for text in innocent)


def test_nothing_from_outside_is_run():
    """No code of a model, a dataset or a checkpoint: no pickle, no eval, and no remote code of tokenizers."""
    for module, path in FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not imports(path.read_text(encoding="utf-8")) & {"pickle", "dill", "marshal", "shelve", "torch"}, module
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            assert not (isinstance(call.func, ast.Name) and name in ("eval", "exec", "compile")), module
            if name in ("from_pretrained", "load_dataset"):
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert given.get("trust_remote_code", "False") == "False", module
                assert name == "load_dataset" or "trust_remote_code" in given, module


def test_what_commands_write_does_not_fail_the_linter(tmp_path):
    """Neither their files, nor a folder that has the name of a module of tests, also where there is no git."""
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if ruff is None:
        pytest.skip("ruff is not installed; the extra dev brings it")
    shutil.copy(ROOT / "ruff.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_train.py", tmp_path / "tests")
    for name in ("runs", "evaluations", "studies"):
        (tmp_path / name / "mine").mkdir(parents=True)
        (tmp_path / name / "mine" / "notes.py").write_text("import sys,os")
    for path in (ROOT / "tests").glob("*.py"):
        (tmp_path / path.stem).mkdir(exist_ok=True)
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *check, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def fast_tests(file):
    """Names of the tests of a file that `pytest -m "not slow"` runs."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if any(isinstance(node, ast.Assign) and "mark.slow" in ast.unparse(node) for node in body):
        return []
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [node.name for node in tests if not any("mark.slow" in ast.unparse(mark) for mark in node.decorator_list)]


def test_fast_tests_touch_every_folder():
    folders = {file.parent for file in (ROOT / "tests").rglob("test_*.py")}
    assert len(folders) > 10
    without = [folder.name for folder in folders if not any(map(fast_tests, folder.glob("test_*.py")))]
    assert without == []
