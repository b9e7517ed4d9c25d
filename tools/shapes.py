"""Verify the shapes in annotations while tests run:

`points: Float[Tensor, "B N 3"]` must be true in every call that returns.

`install` puts a hook before the imports of the package. It wraps each function and method that has an annotation of
jaxtyping, so that beartype looks at its arguments and its result after it has returned, with one meaning for each
letter. Shapes that a function has been verified with are not looked at again. An error that the function itself raises
for wrong input passes through. Compiled functions of Numba and Triton are no Python functions: they are left alone.
While torch.compile traces a function, nothing is verified.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped

PACKAGE = "diffdrr"
CONF = BeartypeConf(is_pep484_tower=True)  # whole numbers are floats
# Functions that are not verified, by module and name, and why.
NOT_VERIFIED: dict[str, str] = {}
MARK = "__shapes_verified__"


class WrongShape(AssertionError):
    "An annotation that was not true."


def mentions_arrays(annotation: object) -> bool:
    "Say whether an annotation holds one of jaxtyping, at any depth."
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(mentions_arrays(part) for part in getattr(annotation, "__args__", ()))


def resolve(annotation: object, function: FunctionType) -> object:
    "Evaluate an annotation that is text; None for one that is not about arrays."
    if isinstance(annotation, str):
        if "[Tensor" not in annotation and "[torch.Tensor" not in annotation:
            return None
        annotation = eval(annotation, function.__globals__)  # the source of this package, no one else's
    return annotation if mentions_arrays(annotation) else None


def shape_hints(function: FunctionType) -> dict[str, object]:
    "Return the annotations of a function that are about arrays, by parameter, and that of its result as `return`."
    found = {name: resolve(annotation, function) for name, annotation in function.__annotations__.items()}
    return {name: annotation for name, annotation in found.items() if annotation is not None}


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe, value))})"
    return type(value).__name__


def compare(name: str, values: dict[str, object], hints: dict[str, object]) -> None:
    "Raise `WrongShape` unless arguments and result are what annotations say."
    with jaxtyped("context"):
        for place, hint in hints.items():
            if place in values and not is_bearable(values[place], hint, conf=CONF):
                others = ", ".join(
                    f"{other}: {describe(values[other])}" for other in hints if other in values and other != place
                )
                raise WrongShape(
                    f"{name}: {place} is {describe(values[place])} and not {hint}"
                    + (f", with {others}" if others else "")
                )


def shapes_of(value: object) -> object:
    """Return what an annotation can say about a value: shapes and dtypes of arrays, and types. What else holds values
    equals nothing, so that it is looked at each time."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return type(value), tuple(value.shape), value.dtype
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(shapes_of, value))
    if isinstance(value, dict):
        return dict, tuple(value), tuple(map(shapes_of, value.values()))
    return object() if isinstance(value, Iterable) and not isinstance(value, str) else type(value)


def verified(function: FunctionType) -> FunctionType:
    """Wrap a function so that its annotations are verified when it returns; return it as it is if it has none about
    arrays."""
    name = f"{function.__module__}.{function.__qualname__}"
    plain = hasattr(function, "__wrapped__") or inspect.isgeneratorfunction(function)
    if plain or name in NOT_VERIFIED or not any("Tensor" in str(a) for a in function.__annotations__.values()):
        return function
    signature = inspect.signature(function)
    variadic = {p.name for p in signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    hints: dict[str, object] = {}
    known: set[object] = set()  # shapes that have been verified
    is_ready = False

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        if not torch.compiler.is_compiling():
            check(args, kwargs, result)
        return result

    def check(args: tuple, kwargs: dict[str, Any], result: object) -> None:
        nonlocal is_ready
        if not is_ready:  # now every name in the annotations exists
            hints.update({name: hint for name, hint in shape_hints(function).items() if name not in variadic})
            is_ready = True
        shapes = shapes_of((args, kwargs, result))
        if hints and shapes not in known:
            compare(name, {**signature.bind(*args, **kwargs).arguments, "return": result}, hints)
            known.add(shapes)

    setattr(wrapper, MARK, True)
    return wrapper


def verify_class(cls: type) -> None:
    "Wrap the methods and properties in the body of a class."
    for name, member in list(vars(cls).items()):
        if isinstance(member, FunctionType) and name != "__new__":
            setattr(cls, name, verified(member))
        elif isinstance(member, (classmethod, staticmethod)) and isinstance(member.__func__, FunctionType):
            setattr(cls, name, type(member)(verified(member.__func__)))
        elif isinstance(member, property) and isinstance(member.fget, FunctionType):
            setattr(cls, name, property(verified(member.fget), member.fset, member.fdel, member.__doc__))


def verify_namespace(
    namespace: dict[str, Any],  # of a module or of a notebook
    module: str,  # whose definitions are wrapped
) -> None:
    "Wrap the functions and classes that a namespace defines."
    for name, value in list(namespace.items()):
        if getattr(value, "__module__", None) != module or name.startswith("__"):
            continue
        if isinstance(value, FunctionType):
            namespace[name] = verified(value)
        elif inspect.isclass(value) and MARK not in vars(value):
            verify_class(value)
            if not issubclass(value, tuple):
                setattr(value, MARK, True)


class VerifyingLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        verify_namespace(vars(module), module.__name__)


class Hook(MetaPathFinder):
    "Finds the modules of the package as Python does, and has what they define wrapped."

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = VerifyingLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    "Verify the shapes of all modules of the package that are imported from now on."
    if not any(isinstance(finder, Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, Hook())


def is_installed() -> bool:
    return any(isinstance(finder, Hook) for finder in sys.meta_path)


def verifying_shell(shell_class: type) -> Callable:
    "Make shells for notebooks that also verify what the notebook defines, after each cell."

    def make(*args, **kwargs):
        shell = shell_class(*args, **kwargs)
        shell.events.register("post_run_cell", lambda *_: verify_namespace(shell.user_ns, "__main__"))
        return shell

    return make
