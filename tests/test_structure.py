"""The floors of the house, read from the imports with `ast`, and what no tracked file may hold.

A module may import from floors below its own, or from modules named before it in its own row. A new module gets its
place in FLOORS first; a place whose module does not exist yet is fine.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "igrpo_jax"

# Floors from the ground up; each holds rows, each row modules in order.
FLOORS = [
    ["config batch preemption watchdog chips"],
    [
        "programs",
        "collectives",
        "sharding",
        "cluster",
        "rewards/exact rewards/functions rewards/tokens rewards/expression rewards/nodes rewards/regions rewards/words "
        "rewards/answers rewards/symbolic rewards/extraction rewards/math_grader "
        "rewards/format rewards/pool rewards/judge rewards/reward rewards/grade",
    ],
    [
        "prompts tasks/arithmetic readers columns filters datasets_table data",
        "algorithms",
        "models/shapes models/config models/cache models/splash models/attention models/layers models/mamba2 "
        "models/lora models/decoder models/hf models/hf_write",
    ],
    ["policy", "logprobs costs", "sampling/draw sampling/steps sampling/engine sampling/scheduler"],
    ["exchange rollout", "packing learner warm_start", "trackers metrics alerts console workdir checkpoint"],
    ["weights measures results evaluation inference"],
    [
        "task overview train footprint",
        "reporting/runs reporting/samples reporting/summary reporting/panels reporting/figures reporting/pages",
    ],
    ["runtime main evaluate generate export aot report"],
]
PLACES = {
    name: (floor, row, place)
    for floor, rows in enumerate(FLOORS)
    for row, names in enumerate(rows)
    for place, name in enumerate(names.split())
}

# Libraries that import jax; importing one is importing it.
IMPORT_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "einshape", "distrax", "rlax"}
# Importing these must leave jax alone: workers are spawned with them, and bad input is reported before any device work.
WITHOUT_JAX = ("config", "batch", "preemption", "watchdog", "chips", "main", "evaluate", "generate", "aot")


def allowed(importer, imported):
    (floor, row, place), (other_floor, other_row, other_place) = PLACES[importer], PLACES[imported]
    return other_floor < floor or ((other_floor, other_row) == (floor, row) and other_place < place)


def package_files(root):
    """Room name ("rewards/pool"; "rewards/__init__" for a package) -> file, for every module under `root`."""
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


def rooms_among(names, files):
    """Those of `names` that are modules of the package, as room names."""
    rooms = {name.partition(".")[2].replace(".", "/") for name in names if name.startswith(PACKAGE + ".")}
    return {room for room in rooms if room in files}


def floor_violations(files):
    found = []
    for room, path in files.items():
        if room.endswith("__init__"):
            continue
        if room not in PLACES:
            found.append(f"{room}: has no place in FLOORS")
            continue
        for other in sorted(rooms_among(imports(path.read_text(encoding="utf-8")), files)):
            if other in PLACES and not allowed(room, other):
                found.append(f"{room} imports {other}, which is not below it")
    return found


def reaches_jax(room, files, everywhere=False, seen=None):
    """The chain of imports from `room` to jax at module level (in functions too with `everywhere`), None if none."""
    seen = set() if seen is None else seen
    seen.add(room)
    names = imports(files[room].read_text(encoding="utf-8"), everywhere)
    for name in sorted(names):
        if name.partition(".")[0] in IMPORT_JAX:
            return f"{room} -> {name}"
    parents = {"__init__", *(f"{other.rpartition('/')[0]}/__init__" for other in (room, *rooms_among(names, files)))}
    for other in sorted((rooms_among(names, files) | parents) & files.keys() - seen):
        chain = reaches_jax(other, files, everywhere, seen)
        if chain:
            return f"{room} -> {chain}"
    return None


FILES = package_files(ROOT / PACKAGE)


def test_modules_import_only_from_below():
    assert floor_violations(FILES) == []


def test_there_are_no_cycles():
    # Follows from the floors for modules in the table; this one needs no table, and counts imports in functions.
    graph = {room: rooms_among(imports(path.read_text(encoding="utf-8")), FILES) for room, path in FILES.items()}
    while free := [room for room, others in graph.items() if not others & graph.keys()]:
        for room in free:
            del graph[room]
    assert graph == {}


def test_where_jax_is_not_imported():
    for room in FILES:
        if room in WITHOUT_JAX or room.endswith("__init__"):
            assert reaches_jax(room, FILES) is None
        if room.startswith("rewards/"):
            assert reaches_jax(room, FILES, everywhere=True) is None


@pytest.mark.parametrize("module", ["", ".config", ".batch", ".rewards.reward", ".rewards.grade", ".main", ".evaluate"])
def test_importing_it_leaves_jax_out(module):
    # The proof of the above on what third parties really import.
    if module and module[1:].replace(".", "/") not in FILES:
        pytest.skip("not written yet")
    code = f"import sys, {PACKAGE}{module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_packages_hold_only_a_docstring_and_the_version():
    for room, path in FILES.items():
        if room.endswith("__init__"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                is_version = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
                assert is_docstring or (is_version and room == "__init__"), f"{path}: {ast.unparse(node)}"


def test_every_folder_with_modules_is_a_package_and_none_is_a_drawer():
    for room, path in FILES.items():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py and would not be installed"
        assert path.name not in ("utils.py", "util.py", "helpers.py", "misc.py", "common.py"), room


def test_library_code_does_not_print():
    commands = [*FLOORS[-1][-1].split(), "rewards/grade"]
    for room, path in FILES.items():
        calls = [
            node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ]
        assert room in commands or "print" not in [call.id for call in calls if isinstance(call, ast.Name)], room


def declared_requirements():
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTALL_REQUIRES":
            return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in ast.literal_eval(node.value)}
    raise AssertionError("setup.py: INSTALL_REQUIRES not found")


def test_every_import_is_a_declared_requirement():
    # Caught here although another requirement happens to bring it today.
    distributions = {"absl": "absl-py", "orbax": "orbax-checkpoint", "google": "protobuf"}
    optional = {"libtpu", "matplotlib", "openai", "tokamax", "wandb"}
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


@pytest.mark.parametrize(
    "room, source, expected",
    [
        ("algorithms", "from igrpo_jax import learner", "algorithms imports learner"),
        ("learner", "import igrpo_jax.rollout as r", "learner imports rollout"),  # same floor, another row
        ("rewards/pool", "from igrpo_jax.rewards.reward import Verifier", "rewards/pool imports rewards/reward"),
        ("batch", "def f():\n    from igrpo_jax import train", "batch imports train"),  # a lazy import is one too
        ("helper", "", "helper: has no place"),
    ],
)
def test_the_floors_catch_what_they_should(tmp_path, room, source, expected):
    files = dict.fromkeys(("learner", "rollout", "rewards/reward", "train"), tmp_path / "empty.py")
    (tmp_path / "empty.py").write_text("")
    files[room] = tmp_path / "guilty.py"
    files[room].write_text(source)
    (message,) = floor_violations(files)
    assert message.startswith(expected)


def test_the_road_to_jax_is_found(tmp_path):
    sources = {
        "config": "import json\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax",
        "main": "from igrpo_jax import middle\ndef main():\n    import jax",
        "middle": "try:\n    from igrpo_jax.models.deep import f\nexcept ImportError:\n    pass",
        "models/__init__": "import optax",
        "models/deep": "",
    }
    files = {}
    for room, source in sources.items():
        files[room] = tmp_path / (room.replace("/", "_") + ".py")
        files[room].write_text(source)
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
    for room, path in FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not imports(path.read_text(encoding="utf-8")) & {"pickle", "dill", "marshal", "shelve", "torch"}, room
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            assert not (isinstance(call.func, ast.Name) and name in ("eval", "exec", "compile")), room
            if name in ("from_pretrained", "load_dataset"):
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert given.get("trust_remote_code", "False") == "False", room
                assert name == "load_dataset" or "trust_remote_code" in given, room
