"""Classes of installed libraries, read from their source without importing the libraries."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


FOLLOWED = ("transformers", "trl")
# Imported as usual, since they take no time
LIGHT = sys.stdlib_module_names | {"yaml", "packaging"}


@cache
def read_class(module: str, name: str) -> Any:
    """
    A class of an installed library, with its fields if it is a dataclass, and otherwise with its methods too.

    Importing transformers, TRL and torch takes seconds; reading from their source takes a fraction of one. Source that
    cannot be read in this way is imported, which is slow but gives the same.
    """
    try:
        return SourceModule.named(module).define(name)
    except Exception:
        return getattr(import_module(module), name)


class SourceModule:
    """
    A module of which only those statements run that are needed to define the names asked for.

    Of an `if` or `try` at the top, the first branch counts: the libraries ask there for packages that are installed. A
    type from a library that is not followed stands for any text; the library itself judges the value.

    Args:
        name (`str`): Full name of the module.
    """

    def __init__(self, name: str) -> None:
        path = _path(name)
        self.name = name
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.statements: dict[str, ast.stmt] = {}
        for statement in _first_branches(ast.parse(path.read_text(encoding="utf-8")).body):
            for bound in _bound_names(statement):
                self.statements.setdefault(bound, statement)
        self.namespace: dict[str, Any] = {"__name__": name}

    @staticmethod
    @cache
    def named(name: str) -> "SourceModule":
        return SourceModule(name)

    def __getattr__(self, name: str) -> Any:
        return self.define(name)

    def define(self, name: str) -> Any:
        """
        Run the statement that binds `name`, after those that it needs.

        Raises:
            AttributeError: if there is none.
        """
        if name in self.namespace:
            return self.namespace[name]
        if name not in self.statements:
            raise AttributeError(f"{self.name} has no {name}")
        statement = self.statements[name]
        if isinstance(statement, ast.ImportFrom):
            self.namespace[name] = self._imported(statement, name)
            return self.namespace[name]
        if isinstance(statement, ast.ClassDef) and _is_dataclass(statement):
            statement.body = _fields(statement)
        for node in ast.walk(statement):
            used = node.id if isinstance(node, ast.Name) else name
            if used != name and used in self.statements and used not in self.namespace:
                self.define(used)
        exec(compile(ast.Module([statement], []), f"<{self.name}>", "exec"), self.namespace)
        return self.namespace[name]

    def _imported(self, statement: ast.ImportFrom, name: str) -> Any:
        original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        parts = self.package.split(".")
        base = parts[: len(parts) - statement.level + 1] if statement.level else []
        module = ".".join([*base, *([statement.module] if statement.module else [])])
        library = module.partition(".")[0]
        if library in LIGHT:
            return getattr(import_module(module), original)
        if library not in FOLLOWED:
            return type(original, (str,), {})
        source = SourceModule.named(module)
        return source.define(original) if original in source.statements else SourceModule.named(f"{module}.{original}")


def _path(name: str) -> Path:
    """File of a module, found without importing its packages."""
    package, _, _ = name.rpartition(".")
    folders = [str(_path(package).parent)] if package else None
    spec = PathFinder.find_spec(name, folders)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no source of {name}")
    return Path(spec.origin)


def _first_branches(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If | ast.Try):
            yield from _first_branches(statement.body)
        else:
            yield statement


def _bound_names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _fields(statement: ast.ClassDef) -> list[ast.stmt]:
    """The fields of a dataclass, and what is assigned in its body for their defaults."""
    body = list(_first_branches(statement.body))
    declared = [part for part in body if isinstance(part, ast.AnnAssign)]
    used = {node.id for part in declared for node in ast.walk(part) if isinstance(node, ast.Name)}
    return [
        part for part in body if part in declared or (isinstance(part, ast.Assign) and used & {*_bound_names(part)})
    ]


def _is_dataclass(statement: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in statement.decorator_list)
