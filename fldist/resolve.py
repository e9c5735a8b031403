"""From a name in a configuration to the class or function that it means.

A short name is a module of the package it belongs to, or an entry of that package's table of names;
`mypkg.mine:Thing` and `path/to/mine.py:Thing` name a user's own and work the same way everywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

OWN = "mypkg.mine:Thing or path/mine.py:Thing"


def load_own(reference: str, field: str) -> Any:
    """Load `module:Thing` or `file.py:Thing`; ValueError names what is missing."""
    where, _, name = reference.rpartition(":")
    try:
        module = _load_file(where) if where.endswith(".py") else _load_module(where)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"{field}: {reference!r} cannot be loaded: {error}") from None
    thing = getattr(module, name, None)
    if thing is None:
        raise ValueError(f"{field}: {where!r} has no {name!r}")
    return thing


def _load_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # the console script does not have the working directory on its path
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _load_file(where: str) -> ModuleType:
    path = Path(where).resolve()
    name = f"fldist_own_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def unknown(
    field: str, value: str, known: list[str], own: str = "mypkg.mine:Thing or path/mine.py:Thing"
) -> ValueError:
    """The error for a name that means nothing; proposes the nearest."""
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"{field}: unknown name {value!r}; {hint}known: {', '.join(known)}, or your own as {OWN}")


def modules_of(package: str) -> list[str]:
    """The short names of a package: its modules."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def from_package(package: str, name: str, base: type, field: str) -> type:
    """The subclass of `base` that the module `package.name` defines, or a user's own."""
    if ":" in name:
        thing = load_own(name, field)
        if not (isinstance(thing, type) and issubclass(thing, base)):
            raise ValueError(f"{field}: {name!r} is not a subclass of {base.__module__}.{base.__qualname__}")
        return thing
    known = modules_of(package)
    if name not in known:
        raise unknown(field, name, known)
    module = importlib.import_module(f"{package}.{name}")
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, base) and c.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one {base.__name__}"
    return found[0]


def nested(package: str, base: type, given: Any, wanted: str) -> tuple[type, dict[str, Any], str]:
    """The class, the fields and the name that `scaffold`, or `{name: fedprox, mu: 0.01}`, means as a component's field.

    For pydantic's BeforeValidators, as `component`. wanted: what is said of something else.
    """
    fields = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"it must be {wanted}")
    try:
        return from_package(package, name, base, "name"), fields, name
    except ValueError as error:
        raise wrong("name", str(error).removeprefix("name: "), name) from None


def component(kind: type, fields: Mapping[str, Any], name: str) -> Any:
    """A dataclass made of fields that a user wrote, for pydantic's BeforeValidators of keys that hold such a thing.

    What is wrong is a ValidationError (a ValueError) whose location is the field, so that the configuration's errors
    name `KEY.FIELD`. name: what the user calls it.
    """
    from pydantic import TypeAdapter

    known = [field.name for field in dataclasses.fields(kind)]
    for key in fields:
        if key not in known:
            raise wrong(key, f"{name} has no such field; it has {', '.join(known) or 'none'}", fields[key])
    return TypeAdapter(kind).validate_python(dict(fields))


def wrong(field: str, said: str, given: object) -> ValueError:
    """An error whose location is a field."""
    from pydantic_core import PydanticCustomError, ValidationError

    error = PydanticCustomError("component", "{said}", {"said": said})
    return ValidationError.from_exception_data("component", [{"type": error, "loc": (field,), "input": given}])


def from_table(table: Mapping[str, str], name: str, field: str) -> Any:
    """The thing that a package's table of names points to (`module:Thing`), or a user's own."""
    if ":" in name:
        return load_own(name, field)
    if name not in table:
        raise unknown(field, name, sorted(table))
    where, _, thing = table[name].rpartition(":")
    return getattr(importlib.import_module(where), thing)
