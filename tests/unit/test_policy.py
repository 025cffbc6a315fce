"""Rules that the whole project keeps, read from its syntax trees: nothing here imports what it checks."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dino_dist.config import Config, leaves

ROOT = Path(__file__).parents[2]

LAYERS = (
    ("dino_dist", "errors", "exit_codes", "polling"),
    (
        *("durations", "randomness", "losses", "centering", "health", "alarms", "throughput", "progress"),
        *("fencing", "manifest", "models", "slurm", "network_defaults", "rendezvous", "liveness", "stacks"),
    ),
    ("dist", "preemption", "requeue", "watchdog"),
    ("config", "data", "eval", "run_folder", "checkpoint_tensors"),
    ("config_checks", "augment_presets", "inputs", "weights"),
    ("config_file", "schedules", "ledger", "metrics", "parallelize", "export", "pictures"),
    ("optim", "checkpoint", "run_session", "judging", "report"),
    ("student_teacher",),
    ("step",),
    ("build", "views", "monitor", "init_from"),
    ("run",),
    ("agreement",),
    ("resume",),
    ("stopping",),
    ("train",),
    (
        *("launch.local", "launch.job_options", "launch.cluster_facts", "launch.probe", "launch.faulty_hosts"),
        *(
            "launch.run_progress",
            "launch.snapshot",
            "launch.submission",
            "launch.wait",
            "launch.gpu_demand",
            "launch.data_costs",
            "launch.results",
        ),
    ),
    (
        *("launch.quickstart", "launch.aftermath", "launch.plan", "launch.cluster_file", "launch.cluster_rules"),
        *("launch.status", "launch.logs", "launch.cancel", "launch.data_doctor", "launch.judging"),
    ),
    ("launch.preflight", "launch.task"),
    ("launch.batch_job", "launch.doctor"),
    ("launch.submit",),
    (
        *("launch.cli_cluster", "launch.cli_eval", "launch.cli_export", "launch.cli_pictures"),
        *("launch.cli_report", "launch.cli_retrieval"),
    ),
    ("launch.cli",),
)
"""Rooms from bottom to top: an import goes to a lower layer. Those of `ROOMS_OF_FILES` are several files each."""

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ROOMS_OF_FILES = ("data", "eval", "export", "judging", "models", "pictures", "report", "weights")

DATA_LAYERS = (("recent", "stores", "crops"), ("shards",), ("reading", "order"), ("loading",), ("prepare",))
"""Rooms within `data`, from bottom to top."""

KNOW_NOTHING_OF_EACH_OTHER = ("losses", "centering", "schedules", "data", "models")

MAX_LINES = 400
SECTION_ALIASES = {
    ("dino_dist/optim.py", "section"): "optim",
    ("dino_dist/judging/evaluator.py", "section"): "eval",
    ("dino_dist/judging/judge.py", "section"): "eval",
    ("dino_dist/judging/linear_probe.py", "section"): "eval",
}
"""Functions that take a whole section under another name than its own."""

ENVIRONMENT_READERS = ("dino_dist/dist.py", "launch/")

TORCH_FILES = {"torch.load": "dino_dist/weights/torch_file.py", "torch.save": "dino_dist/export/dino_checkpoint.py"}
"""Where the published checkpoints' format, a pickle, is read (by torch's restricted reader) and written."""

PRIVATE_OF_TORCH = {"_foreach_norm", "_foreach_add", "_foreach_add_", "_foreach_mul", "_foreach_mul_", "_foreach_sub"}
"""Documented in use by torch's own optimizers, and the only way to a few kernels for hundreds of tensors."""


@cache
def files(*folders: str) -> tuple[Path, ...]:
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in files("dino_dist", "launch", "tools")}


def imported_modules(path: Path) -> Iterator[str]:
    """This project's modules that a file imports, inside functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{relative(path)}:{node.lineno}: relative import"
            assert node.module
            names = []
            for (
                alias
            ) in node.names:  # `from package import module` names the module, `from module import thing` does not
                inner = f"{node.module}.{alias.name}"
                names.append(inner if inner in MODULES else node.module)
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("dino_dist", "launch", "tools"))


def room_of(module: str) -> str:
    """`dino_dist.data.shards.index` -> `data`, `dino_dist.step` -> `step`, `launch.cli` -> `launch.cli`."""
    parts = module.split(".")
    if parts[0] == "dino_dist" and len(parts) > 1:
        return parts[1]
    return module


def import_graph(*folders: str) -> Iterator[tuple[str, str]]:
    for path in files(*folders):
        for imported in imported_modules(path):
            yield module_of(path), imported


def test_every_module_has_its_layer() -> None:
    rooms = {room_of(module) for module in MODULES if module.split(".")[0] != "tools"} - {"launch"}
    assert rooms - LEVEL.keys() == set(), "give these a place in LAYERS"
    assert LEVEL.keys() - rooms == set(), "these are gone: take them out of LAYERS"


def test_imports_point_down() -> None:
    edges = list(import_graph("dino_dist", "launch"))
    assert len(edges) > 100, "the parser found too little to be trusted"
    for module, imported in edges:
        room, target = room_of(module), room_of(imported)
        if room == target and room in ROOMS_OF_FILES:
            continue
        assert LEVEL[target] < LEVEL[room], (
            f"{module} (layer {LEVEL[room]}) may not import {imported} ({LEVEL[target]})"
        )


def test_imports_within_data_point_down() -> None:
    level = {room: level for level, rooms in enumerate(DATA_LAYERS) for room in rooms}
    edges = {
        (module.split(".")[2], imported.split(".")[2])
        for module, imported in import_graph("dino_dist/data")
        if imported.startswith("dino_dist.data.") and module != "dino_dist.data"
    }
    assert {room for edge in edges for room in edge} | {"crops"} == level.keys()
    assert not [(room, target) for room, target in edges if room != target and level[target] >= level[room]]


@pytest.mark.parametrize("room", ROOMS_OF_FILES)
def test_files_of_a_room_import_in_one_direction(room: str) -> None:
    edges = {
        (module, imported)
        for module, imported in import_graph(f"dino_dist/{room}")
        if room_of(imported) == room and imported != f"dino_dist.{room}"
    }
    left = {module for edge in edges for module in edge}
    while left:
        free = {module for module in left if not any(a == module and b in left for a, b in edges)}
        assert free, f"these import each other in a circle: {sorted(left)}"
        left -= free


def test_nothing_imports_launch_or_tools() -> None:
    for module, imported in import_graph("dino_dist"):
        assert not imported.startswith(("launch", "tools")), f"{module} imports {imported}"
    for module, imported in import_graph("launch", "tools"):
        assert not imported.startswith("tools"), f"{module} imports {imported}"


def test_the_parts_of_the_method_know_nothing_of_each_other() -> None:
    below: dict[str, set[str]] = {}
    for module, imported in import_graph("dino_dist"):
        below.setdefault(room_of(module), set()).add(room_of(imported))
    for room in KNOW_NOTHING_OF_EACH_OTHER:
        reached, frontier = {room}, {room}
        while frontier:
            frontier = set().union(*(below.get(other, set()) for other in frontier)) - reached
            reached |= frontier
        strangers = reached & set(KNOW_NOTHING_OF_EACH_OTHER) - {room}
        assert not strangers, f"{room} reaches {sorted(strangers)}"


def test_every_setting_is_read() -> None:
    """As `<section>.<field>`, outside the schema and its checks, which would read a dead setting too."""
    read = set()
    for path in files("dino_dist", "launch"):
        if relative(path) == "dino_dist/config.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                read.add((SECTION_ALIASES.get((relative(path), owner), owner), node.attr))
    unread = {key for key, _, _ in leaves(Config())} - {f"{section}.{name}" for section, name in read}
    assert not unread, f"settings that no code reads: {sorted(unread)}"


def test_every_setting_is_explained() -> None:
    """Each field of a section is followed by a docstring."""
    bare = []
    for section in tree(ROOT / "dino_dist/config.py").body:
        if not isinstance(section, ast.ClassDef) or not section.name.endswith("Section"):
            continue
        for field, following in zip(section.body, [*section.body[1:], ast.Pass()], strict=True):
            if isinstance(field, ast.AnnAssign) and not (
                isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            ):
                bare.append(f"{section.name}.{ast.unparse(field.target)}")
    assert not bare, bare


@pytest.mark.parametrize("path", files("dino_dist", "launch", "tools"), ids=relative)
def test_a_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines, more than {MAX_LINES}: split it"
    assert ast.get_docstring(tree(path)), f"{relative(path)} has no docstring"


@pytest.mark.parametrize("path", files("dino_dist", "launch", "tools"), ids=relative)
def test_a_file_keeps_the_rules(path: Path) -> None:
    broken = [f"{relative(path)}:{line}: {what}" for line, what in broken_rules(path)]
    assert not broken, "\n".join(broken)


def broken_rules(path: Path) -> Iterator[tuple[int, str]]:
    is_tool = relative(path).startswith("tools/")
    reads_environment = relative(path).startswith(ENVIRONMENT_READERS)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            yield from _too_wide(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from _risky_import(node, is_tool=is_tool)
        elif isinstance(node, ast.Attribute):
            if ast.unparse(node) in TORCH_FILES and TORCH_FILES[ast.unparse(node)] != relative(path):
                yield node.lineno, f"{ast.unparse(node)} pickles"
            yield from _risky_name(node, is_tool=is_tool, reads_environment=reads_environment)
        elif isinstance(node, ast.Global):
            yield node.lineno, "global state"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "__import__"):
            yield node.lineno, f"{ast.unparse(node.func)}()"


def _risky_name(node: ast.Attribute, *, is_tool: bool, reads_environment: bool) -> Iterator[tuple[int, str]]:
    name = ast.unparse(node)
    if not all(part.isidentifier() for part in name.split(".")):
        return  # something of a call's result, not a dotted name
    if name in ("os.environ", "os.getenv", "os.putenv") and not reads_environment:
        yield node.lineno, f"{name} outside {ENVIRONMENT_READERS}: the world is an argument"
    private = {part for part in name.split(".") if part.startswith("_") and not part.startswith("__")}
    if name.startswith("torch.") and not is_tool and private - PRIVATE_OF_TORCH:
        yield node.lineno, f"{name} is private to torch"


def _too_wide(node: ast.ExceptHandler) -> Iterator[tuple[int, str]]:
    caught = "" if node.type is None else ast.unparse(node.type)
    raises_again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    if node.type is None or (caught in ("Exception", "BaseException") and not raises_again):
        yield node.lineno, f"except {caught or '(everything)'} that may swallow"


def _risky_import(node: ast.Import | ast.ImportFrom, *, is_tool: bool) -> Iterator[tuple[int, str]]:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for module in modules:
        parts = module.split(".")
        if parts[0] in ("pickle", "dill", "cloudpickle", "shelve", "marshal"):
            yield node.lineno, f"{module}: nothing on disk is pickled"
        if parts[0] == "torch" and any(part.startswith("_") for part in parts) and not is_tool:
            yield node.lineno, f"{module} is private to torch"
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not is_tool:
        private = [alias.name for alias in node.names if alias.name.startswith("_")]
        if private:
            yield node.lineno, f"{private} is private to torch"


@pytest.mark.parametrize("path", files("dino_dist", "launch"), ids=relative)
def test_nothing_happens_at_import(path: Path) -> None:
    """At the top of a module: imports, definitions, constants; a call only to build a constant."""
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    for node in tree(path).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        branch = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        commands = relative(path) == "launch/cli.py" and "add_typer" in ast.unparse(node)
        assert isinstance(node, allowed) or docstring or branch or commands, f"{relative(path)}:{node.lineno}"


def test_files_of_torch_are_never_unpickled_freely() -> None:
    nodes = list(ast.walk(tree(ROOT / TORCH_FILES["torch.load"])))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    mentions = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"]
    assert len(calls) == len(mentions) == 1, "called once, and under no other name"
    assert "weights_only=True" in [ast.unparse(keyword) for keyword in calls[0].keywords]


def test_continuous_integration_runs_what_the_readme_promises() -> None:
    result = subprocess.run([ROOT / ".ci/run", "--print"], capture_output=True, text=True, check=True)
    command = result.stdout.strip()
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert command.endswith("python -m pytest")
    for check in ("ruff check .", "ruff format --check .", "mypy"):
        assert f"&& {check} &&" in " ".join(command.replace("\\\n", " ").split())


def test_no_file_is_a_junk_drawer() -> None:
    names = {path.stem for path in files("dino_dist", "launch", "tools")}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


def test_help_needs_no_torch() -> None:
    """The command line answers `--help` at once: nothing it imports at the top pulls torch in."""
    program = (
        "import sys; import launch.cli; "
        "heavy = {'torch', 'torchvision', 'sklearn', 'tensorboard', 'fairscale'} & sys.modules.keys(); "
        "sys.exit(f'imported: {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
