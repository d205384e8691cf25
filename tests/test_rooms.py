"""The house: which room may import which, no circles, and commands that nothing imports."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# What each room may import beside itself
ROOMS = {
    "modeling_movekd": set(),
    "hub": {"modeling_movekd"},
    "train": {"modeling_movekd", "hub"},
    "benchmarks": {"modeling_movekd", "hub", "train"},
}
# Inside `train`, from the bottom up: a module imports those of lower floors and of its own.
FLOORS = (
    (
        *(
            "train.installed",
            "train.options",
            "train.presets",
            "train.config",
            "train.encoder_options",
            "train.expert_options",
            "train.checkpoints",
            "train.arguments",
        ),
        *("train.teachers", "train.distributed"),
    ),
    ("train.data", "train.distillation", "train.language_lora"),
    ("train.build", "train.build_encoder", "train.forward"),
    ("train.answers", "train.callbacks", "train.model_card", "train.publish", "train.plan", "train.cache_writer"),
    ("train.distilling", "train.trainer", "train.encoder_trainer"),
    ("train.run", "train.feature_cache"),
    ("train.demo",),
    ("train.sft",),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Our modules that a module imports, wherever in its text: in functions and for type checking too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {module for module in found if module in MODULES and module != name}


GRAPH = {name: imports(name) for name in MODULES}


def is_command(name: str) -> bool:
    text = MODULES[name].read_text(encoding="utf-8")
    return name.endswith("__main__") or any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in ast.parse(text).body
    )


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def floor(name: str) -> int:
    return next(
        number
        for number, rooms in enumerate(FLOORS)
        if any(name == room or name.startswith(f"{room}.") for room in rooms)
    )


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_below_it(room):
    allowed = ROOMS[room] | {room}
    upward = [
        f"{name} imports {other}"
        for name in GRAPH
        if name.split(".")[0] == room
        for other in sorted(GRAPH[name])
        if other.split(".")[0] not in allowed
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    assert not circle(GRAPH)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_a_command_is_imported_by_nothing():
    commands = {name for name in MODULES if is_command(name)}
    assert {"train.sft", "train.feature_cache", "hub.push", "train.plan.__main__", "modeling_movekd.chat"} <= commands
    assert not [f"{name} imports {other}" for name in GRAPH for other in sorted(GRAPH[name] & commands)]


def test_floors_of_train():
    train = [name for name in MODULES if name.startswith("train.")]
    upward = [
        f"{name} imports {other}"
        for name in train
        for other in sorted(GRAPH[name])
        if other.startswith("train.") and floor(other) > floor(name)
    ]
    assert not upward


def test_the_space_imports_no_room():
    rooms = {*ROOMS, "tests"}
    for path in (ROOT / "spaces").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not rooms & {name.split(".")[0] for name in names}, path
