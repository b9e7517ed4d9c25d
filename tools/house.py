"""The rules of the house that a machine can check, and the measures of issue-sized clean-ups.

Usage: python -m tools.house                     fail if a rule is broken
       python -m tools.house --measure [FOLDER]  print the measures of this checkout, or of another one"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_PARAMETERS = 8
LONGEST_FUNCTION = 50
LONGEST_CLASS = 120
LONGEST_LINE = 120
LONGEST_MODULE = 500

# What may have more parameters or lines than the rules say, and why. Keys are `file.name` as in `drr.DRR.forward`.
# Functions of 0.6.1
# are excused from the number of parameters without being named here: programs call them.
INTERFACE_OF_061 = ROOT / "tests" / "fixtures" / "interface_061.json"
GPU_KERNEL = "the launcher of a GPU kernel passes pointers, strides and sizes one by one"
AUTOGRAD = "torch passes the inputs of an autograd function one by one"
TOO_MANY_PARAMETERS: dict[str, str] = {
    **{
        f"{module}.{kernel}_kernel": GPU_KERNEL
        for module in ("exact", "sampled", "siddon")
        for kernel in ("integrate", "channels", "adjoint")
    },
    **{f"frames.{kernel}_kernel": GPU_KERNEL for kernel in ("rays", "slopes", "twist")},
    "launch.weigh_kernel": GPU_KERNEL,
    "autograd.IntegralGradient.forward": AUTOGRAD,
    "autograd.IntegralGradient.vmap": AUTOGRAD,
    "autograd.Integral.vmap": AUTOGRAD,
    "autograd.rebuild": AUTOGRAD,
    "setup.Setup.set_intrinsics_": "a method of `DRR` with the signature of 0.6.1",
    "pipeline.track": "the one call that most users make: each of its choices has a name and a default",
    "reading.read_xray": "what a file may not say, or say wrongly, has a name and a default each",
    "pipeline.register": "the one call that most users make: each of its choices has a name and a default",
}
TOO_LONG: dict[str, str] = {}
TOO_LONG_CLASSES: dict[str, str] = {}

LAMBDA = re.compile(r"^\s*\w+ = lambda\b")
BY_HAND = re.compile(r"must be one of \{|must be one of '|, '\.join\(map\(repr,")
NUMBER = re.compile(r"^(\d+)_")


@dataclass
class Function:
    "A function or method in the sources of the package."

    file: str  # relative to the checkout
    name: str  # `drr.DRR.forward`
    node: ast.FunctionDef
    cls: ast.ClassDef | None

    @property
    def parameters(self) -> list[ast.arg]:
        "Its parameters, without `self`, `cls` and stars."
        a = self.node.args
        names = a.posonlyargs + a.args + a.kwonlyargs
        return names[1:] if self.cls is not None and names and names[0].arg in ("self", "cls") else names

    @property
    def lines(self) -> int:
        "The length of its body without the docstring."
        body = self.node.body
        first = body[1:] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body
        return self.node.end_lineno - first[0].lineno + 1 if first else 0

    @property
    def is_public(self) -> bool:
        parts = self.name.split(".")[1:]
        return not any(part.startswith("_") and not part.startswith("__") for part in parts)

    @property
    def annotations(self) -> list[str]:
        a = self.node.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
        return [ast.unparse(x) for x in [*(p.annotation for p in given), self.node.returns] if x is not None]

    @property
    def is_compiled(self) -> bool:
        "A kernel of Numba or Triton: a decorator says so."
        return any(
            re.search(r"\b(jit|njit|overload|compile|inline|intrinsic|device|kernel)", ast.unparse(d))
            for d in self.node.decorator_list
        )


@dataclass
class House:
    "A checkout: its modules, its notebooks, and what is found in them."

    root: Path
    modules: dict[str, str] = field(default_factory=dict)  # source by path, of the package
    notebooks: dict[str, list[dict]] = field(default_factory=dict)  # cells by path
    programs: dict[str, str] = field(default_factory=dict)  # source by path, of tests, tools and benchmarks

    def __post_init__(self) -> None:
        skip = ("checkpoint", "__pycache__", "/.", "/_proc", "/_docs")
        for folder, suffix in (
            ("diffdrr", "py"),
            ("nbs", "ipynb"),
            ("tests", "py"),
            ("tools", "py"),
            ("benchmarks", "py"),
        ):
            for path in sorted((self.root / folder).rglob(f"*.{suffix}")):
                name = path.relative_to(self.root).as_posix()
                if any(part in f"/{name}" for part in skip) or path.name == "_modidx.py":
                    continue
                text = path.read_text(encoding="utf-8")
                if suffix == "ipynb":
                    self.notebooks[name] = json.loads(text)["cells"]
                else:
                    (self.modules if folder == "diffdrr" else self.programs)[name] = text

    @cached_property
    def functions(self) -> list[Function]:
        found = []
        for file, source in self.modules.items():
            for function, parents in walk(ast.parse(source)):
                cls = parents[-1] if parents and isinstance(parents[-1], ast.ClassDef) else None
                name = ".".join([Path(file).stem, *(p.name for p in parents), function.name])
                found.append(Function(file, name, function, cls))
        return found

    def classes(self) -> Iterator[tuple[str, ast.ClassDef]]:
        for file, source in self.modules.items():
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ClassDef):
                    yield f"{Path(file).stem}.{node.name}", node

    def python_lines(self) -> Iterator[tuple[str, str]]:
        """Yield lines of code without those within strings of several lines, which hold docstrings, HTML or other
        programs."""
        for name, source in self.sources():
            within = {line for start, end in long_strings(source) for line in range(start, end + 1)}
            yield from ((name, line) for number, line in enumerate(source.splitlines(), 1) if number not in within)

    def sources(self) -> Iterator[tuple[str, str]]:
        "Yield the code that people write: cells of notebooks, programs and tests."
        for name, cells in self.notebooks.items():
            yield from ((name, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code")
        yield from self.programs.items()

    def code_lines(self) -> Iterator[tuple[str, str]]:
        "Yield the lines of that code."
        for name, source in self.sources():
            yield from ((name, line) for line in source.splitlines())

    def public_names(self) -> set[tuple[str, str]]:
        "List what modules list in `__all__`, but for front doors and re-exports, which list names of others."
        found = set()
        for file, source in self.modules.items():
            listed = re.search(r"^__all__ = \[(.*?)\]", source, re.MULTILINE | re.DOTALL)
            if listed and "AUTOGENERATED" in source and not file.endswith("__init__.py"):
                found |= {(file, name) for name in re.findall(r"'(\w+)'", listed[1])}
        return found

    def top_level_names(self) -> set[tuple[str, str]]:
        return {
            (file, node.name)
            for file, source in self.modules.items()
            for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }

    def door_names(self) -> set[str]:
        "List what the front doors of the rooms offer."
        found = set()
        for file, source in self.modules.items():
            table = re.search(r"^NAMES = (\{.*?^\})", source, re.MULTILINE | re.DOTALL)
            if table and file.count("/") == 2:
                found |= {name for names in ast.literal_eval(table[1]).values() for name in names}
        return found

    def bare_headings(self) -> list[str]:
        "List headings that are followed by code or another heading instead of prose."
        found = []
        for name, cells in self.notebooks.items():
            for cell, after in zip(cells, [*cells[1:], None], strict=True):
                text = "".join(cell["source"]).strip() if cell["cell_type"] == "markdown" else ""
                if re.fullmatch(r"#{2,6} [^\n]+", text) and not (after and is_prose(after)):
                    found.append(f"{name}: {text}")
        return found

    def assigned_lambdas(self) -> list[str]:
        return [f"{name}: {line.strip()}" for name, line in self.code_lines() if LAMBDA.search(line)]

    def long_lines(self) -> list[tuple[str, str]]:
        return [(name, line) for name, line in self.code_lines() if len(line) > LONGEST_LINE]

    def checks_by_hand(self) -> list[str]:
        return [
            f"{file}: {line.strip()}"
            for file, source in self.modules.items()
            for line in source.splitlines()
            if BY_HAND.search(line) and "raise" in line and not file.endswith("checks.py")
        ]


def walk(node: ast.AST, parents: tuple = ()) -> Iterator[tuple[ast.FunctionDef, tuple]]:
    "Yield functions and methods with the classes that they stand in, but not functions within functions."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, parents
        elif isinstance(child, ast.ClassDef):
            yield from walk(child, (*parents, child))
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from walk(child, parents)


def long_strings(source: str) -> list[tuple[int, int]]:
    "Return the first and the last line of strings that hold several."
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # a cell with a magic
        return []
    strings = [
        node for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno != node.lineno
    ]
    lines = source.splitlines()
    return [(node.lineno, node.end_lineno) for node in strings if re.search(r"\"{3}|'{3}", lines[node.lineno - 1])]


def length_of(cls: ast.ClassDef) -> int:
    "Count the lines of a class without those of docstrings."
    functions = [
        node for node in ast.walk(cls) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node)
    ]
    return (
        cls.end_lineno - cls.lineno + 1 - sum(node.body[0].end_lineno - node.body[0].lineno + 1 for node in functions)
    )


def is_prose(cell: dict) -> bool:
    text = "".join(cell["source"]).strip()
    return cell["cell_type"] == "markdown" and not text.startswith("#")


def code_part(line: str) -> str:
    "Cut off the comment at the end of a line."
    return re.sub(r"\s+# .*$", "", line) if not line.lstrip().startswith("#") else ""


def too_long_a_line(line: str) -> bool:
    "Code over the limit; the comment beside an argument may reach further, and so may a word that cannot be broken."
    code = code_part(line)
    return len(code) > LONGEST_LINE and len(max(code.split(), key=len)) < LONGEST_LINE // 2


def bound_by_061() -> set[str]:
    "Name the functions, constructors and methods that 0.6.1 had."
    modules = json.loads(INTERFACE_OF_061.read_text(encoding="utf-8"))
    names = {name: facts for module in modules.values() for name, facts in module.items() if "parameters" in facts}
    methods = {
        f"{name}.{method}" for name, facts in names.items() for method in ("__init__", *facts.get("methods", ()))
    }
    return {*names, *methods}


def excused(found: dict[str, str], reasons: dict[str, str]) -> list[str]:
    "Leave out what has a reason."
    return [text for name, text in found.items() if name not in reasons]


def broken_rules(house: House) -> dict[str, list[str]]:
    "List what breaks a rule of the house, by rule."
    functions = house.functions
    bound = bound_by_061()
    wide = {
        f.name: f"{f.file}: {f.name} has {len(f.parameters)} parameters"
        for f in functions
        if len(f.parameters) > MOST_PARAMETERS and f.name.partition(".")[2] not in bound
    }
    long = {f.name: f"{f.file}: {f.name} has {f.lines} lines" for f in functions if f.lines > LONGEST_FUNCTION}
    large = {
        name: f"{name} has {length_of(node)} lines" for name, node in house.classes() if length_of(node) > LONGEST_CLASS
    }
    numbers = [match[1] for name in house.notebooks if (match := NUMBER.match(Path(name).name))]
    return {
        f"more than {MOST_PARAMETERS} parameters": excused(wide, TOO_MANY_PARAMETERS),
        f"more than {LONGEST_FUNCTION} lines": excused(long, TOO_LONG),
        f"a class of more than {LONGEST_CLASS} lines": excused(large, TOO_LONG_CLASSES),
        "two notebooks with one number": sorted({number for number in numbers if numbers.count(number) > 1}),
        "an assigned lambda": house.assigned_lambdas(),
        "a heading without prose": house.bare_headings(),
        f"a line over {LONGEST_LINE} columns": [
            f"{name}: {line.strip()[:80]}..." for name, line in house.python_lines() if too_long_a_line(line)
        ],
        "a choice checked by hand, which `checks.one_of` does": house.checks_by_hand(),
    }


def stale_excuses(house: House) -> list[str]:
    "List reasons for what there is no more."
    functions = {f.name: f for f in house.functions}
    classes = dict(house.classes())
    stale = [
        name
        for name in TOO_MANY_PARAMETERS
        if name not in functions or len(functions[name].parameters) <= MOST_PARAMETERS
    ]
    stale += [name for name in TOO_LONG if name not in functions or functions[name].lines <= LONGEST_FUNCTION]
    return stale + [
        name for name in TOO_LONG_CLASSES if name not in classes or length_of(classes[name]) <= LONGEST_CLASS
    ]


def measures(house: House) -> dict[str, object]:
    "Measure a checkout."
    functions = house.functions
    kernels = {file: source for file, source in house.modules.items() if "kernels/" in file}
    lengths = {file: source.count("\n") for file, source in house.modules.items() if "AUTOGENERATED" in source}
    public, doors = house.public_names(), house.door_names()
    tensors = [f for f in functions if f.is_public and not f.is_compiled and any("Tensor" in a for a in f.annotations)]
    typed = [f for f in tensors if any(re.search(r"\[(torch\.)?Tensor,", a) for a in f.annotations)]
    imports_by_hand = [
        line
        for source in house.modules.values()
        for line in source.splitlines()
        if re.search(r"pip install '?diffdrr\[", line)
    ]
    return {
        f"functions with more than {MOST_PARAMETERS} parameters": sum(
            len(f.parameters) > MOST_PARAMETERS for f in functions
        ),
        "most parameters of a function": max(len(f.parameters) for f in functions),
        f"functions of more than {LONGEST_FUNCTION} lines": sum(f.lines > LONGEST_FUNCTION for f in functions),
        f"classes of more than {LONGEST_CLASS} lines": sum(
            length_of(node) > LONGEST_CLASS for _, node in house.classes()
        ),
        "public names": len(doors) if doors else len(public),
        "names in __all__ of modules": len(public),
        "private functions and classes": len(
            {(f, n) for f, n in house.top_level_names() if "AUTOGENERATED" in house.modules[f]} - public
        ),
        "modules": len(lengths),
        f"modules of more than {LONGEST_MODULE} lines": sum(n > LONGEST_MODULE for n in lengths.values()),
        "lines of the longest module": max(lengths.values()),
        "lines of the package": sum(lengths.values()),
        "lines of kernels/": sum(source.count("\n") for source in kernels.values()),
        f"lines over {LONGEST_LINE} columns": len(house.long_lines()),
        "lines over 140 columns": sum(len(line) > 140 for _, line in house.long_lines()),
        "choices checked by hand": len(house.checks_by_hand()),
        "check_* functions": sum(re.match(r"_?check_", f.node.name) is not None for f in functions),
        "optional imports by hand": len(imports_by_hand),
        "assigned lambdas": len(house.assigned_lambdas()),
        "bare headings": len(house.bare_headings()),
        "tensor functions": len(tensors),
        "tensor functions whose shapes a machine checks": len(typed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the rules of the house.")
    parser.add_argument(
        "--measure", nargs="?", const=str(ROOT), metavar="FOLDER", help="print the measures of a checkout instead"
    )
    folder = parser.parse_args().measure
    if folder is not None:
        for name, value in measures(House(Path(folder))).items():
            print(f"| {name} | {value} |")
        return
    house = House(ROOT)
    broken = {rule: found for rule, found in broken_rules(house).items() if found}
    if stale := stale_excuses(house):
        broken["an excuse in tools/house.py for what needs none"] = stale
    for rule, found in broken.items():
        print(f"{rule} ({len(found)}):", *found, sep="\n  ")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
