"""How nbdev documents a symbol: its signature, its docstring, and tables of its parameters and methods. What a room keeps
to itself is folded."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator
from inspect import Parameter, Signature

from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

from tools.rooms import ROOMS, door_names

LINE_LENGTH = 88
TABLES = {"parameters": ["Parameter", "Type", "Default", "Details"], "methods": ["Methods and properties", "Details"]}


def annotation_text(annotation: object) -> str:
    "Write an annotation as in the source; nothing if there is none."
    if annotation is Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def default_text(default: object) -> str:
    "Write a default as in the source, a function or a class by its name; nothing if there is none."
    if default is Parameter.empty:
        return ""
    return getattr(default, "__name__", None) or repr(default)


def parameter_text(parameter: Parameter) -> str:
    "Write a parameter as in a signature, without its annotation."
    star = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = default_text(parameter.default)
    return f"{star}{parameter.name}" + (f"={default}" if default else "")


def parameter_list(signature: Signature) -> list[str]:
    "List what stands between the brackets of a signature, with its lone `/` and `*`."
    parts: list[str] = []
    previous = None
    for parameter in signature.parameters.values():
        kind = parameter.kind
        if previous is Parameter.POSITIONAL_ONLY and kind is not previous:
            parts.append("/")
        if kind is Parameter.KEYWORD_ONLY and previous not in (kind, Parameter.VAR_POSITIONAL):
            parts.append("*")
        if parameter.name not in ("self", "cls"):
            parts.append(parameter_text(parameter))
        previous = kind
    return parts + (["/"] if previous is Parameter.POSITIONAL_ONLY else [])


def call_text(
    name: str,  # name of a function, or of a class
    signature: Signature | None,  # its signature, None if Python cannot tell
    one_line: bool = False,  # do not break a long line
) -> str:  # one line, or one line for each parameter if it is long
    "Write a symbol as it is called."
    if signature is None:
        return name
    parameters = parameter_list(signature)
    line = f"{name}({', '.join(parameters)})"
    if one_line or len(line) <= LINE_LENGTH:
        return line
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), ")"])


def cell(text: str) -> str:
    "Make text safe for a cell of a Markdown table."
    return " ".join(text.split()).replace("|", r"\|")


def code(text: str) -> str:
    "Write text as code, or nothing for no text."
    return f"`{cell(text)}`" if text else ""


SECTION = re.compile(r"^(Args|Returns):\n((?:(?:[ ]{4}.*)?(?:\n|$))+)", re.MULTILINE)
ITEM = re.compile(r"^(\*{0,2}\w+): (.*(?:\n {4,}.*)*)", re.MULTILINE)


def split_docstring(
    symbol: object,
) -> tuple[str, dict[str, str]]:  # prose; what its sections say, the result as `return`
    "Separate the prose of a docstring from its sections `Args:` and `Returns:`."
    inherits = inspect.isroutine(symbol)  # a method that overrides another has its docstring
    text = (inspect.getdoc(symbol) if inherits else inspect.cleandoc(getattr(symbol, "__doc__", None) or "")) or ""
    meanings: dict[str, str] = {}
    for title, body in SECTION.findall(text):
        if title == "Returns":
            meanings["return"] = " ".join(body.split())
        else:
            meanings |= {
                name.lstrip("*"): " ".join(words.split()) for name, words in ITEM.findall(inspect.cleandoc(body))
            }
    return SECTION.sub("", text).strip(), meanings


def comments_of(symbol: object) -> dict[str, str | None]:
    """Read what the parameters of a function or class mean, from its docstring or the comments beside them; fastcore's
    docments overlooks the one beside `**kwargs`, or takes it for that of the result."""
    comments = docments(symbol)
    try:
        keywords = re.search(r"^\s*\*\*(\w+)[^#\n]*#\s*(.+)$", inspect.getsource(symbol), re.MULTILINE)
    except (OSError, TypeError):  # made without a file
        keywords = None
    if keywords and keywords[1] in comments:
        comments[keywords[1]] = keywords[2]
        if comments.get("return") == keywords[2]:
            comments["return"] = None
    return comments | split_docstring(symbol)[1]


def parameter_rows(
    symbol: object,  # function or class
    signature: Signature | None,  # its signature, None if Python cannot tell
) -> list[list[str]]:
    "List the parameters of a symbol and what it returns as rows of a table; none if no parameter has a comment."
    comments = comments_of(symbol)
    if signature is None or not any(comments.values()):
        return []
    rows = [
        [
            code(name),
            code(annotation_text(parameter.annotation)),
            code(default_text(parameter.default)),
            cell(comments.get(name) or ""),
        ]
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    returned = signature.return_annotation
    if comments.get("return") or returned not in (Signature.empty, None, "None"):
        rows.append(["**returns**", code(annotation_text(returned)), "", cell(comments.get("return") or "")])
    return rows


def table(
    kind: str,  # which of TABLES; the class of the table, for its style
    rows: list[list[str]],
) -> str:
    "Write rows as a Markdown table without its empty columns; nothing for no rows."
    if not rows:
        return ""
    header = TABLES[kind]
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    lines = [[line[column] for column in kept] for line in [header, ["---"] * len(header), *rows]]
    return "\n".join([f"::: {{.{kind}}}", *(f"| {' | '.join(line)} |" for line in lines), ":::"])


def unwrapped(symbol: object) -> object:
    "Return the function behind a decorator or a property."
    if not hasattr(symbol, "__signature__"):
        symbol = getattr(symbol, "__wrapped__", symbol)
    return getattr(symbol, "fget", None) or symbol


def signature_of(symbol: object) -> Signature | None:
    "Return the signature of a symbol with annotations as in the source, None if Python cannot tell."
    try:
        return inspect.signature(symbol)
    except (TypeError, ValueError):
        return None


def members(symbol: object) -> Iterator[tuple[str, object, bool]]:  # name, function, and whether it is a property
    "List the public methods and properties in the body of a class, as far as they have a docstring."
    for name, member in vars(symbol).items() if inspect.isclass(symbol) else ():
        function = unwrapped(getattr(member, "__func__", member))
        if not name.startswith("_") and inspect.isroutine(function) and function.__doc__:
            yield name, function, isinstance(member, property)


def method_rows(symbol: object) -> list[list[str]]:
    "Sum up methods and properties, with the anchors that nbdev's links lead to."
    rows = []
    for name, function, is_property in members(symbol):
        shown = name if is_property else call_text(name, signature_of(function), one_line=True)
        summary = split_docstring(function)[0].partition("\n\n")[0]
        rows.append([f'<a id="{symbol.__qualname__}.{name}"></a>'.lower() + code(shown), cell(summary)])
    return rows


def method_tables(symbol: object) -> list[str]:
    "Explain the methods that have parameters: the rest of the docstring, and a table."
    blocks = []
    for name, function, is_property in members(symbol):
        signature = signature_of(function)
        if is_property or signature is None or len(signature.parameters) < 2:
            continue
        rest = split_docstring(function)[0].partition("\n\n")[2]
        explained = [text for text in (rest, table("parameters", parameter_rows(function, signature))) if text]
        if explained:
            blocks += [f"**`{symbol.__qualname__}.{name}`**", *explained]
    return blocks


def homes_of(name: str) -> list[str]:
    "List the modules of the package that have a symbol of a name."
    entry = NbdevLookup().entries.get(get_config().lib_name, {"syms": {}})
    return [module for module, symbols in entry["syms"].items() if f"{module}.{name}" in symbols]


def source_link(name: str) -> str:
    """Return a link to the source of a symbol; nothing where no module of the package, or more than one, has a symbol
    of that name."""
    source = NbdevLookup().code(name) if len(homes_of(name)) == 1 else None
    if source is None:
        return ""
    return f'[source]({source}){{target="_blank" style="float:right; font-size:smaller"}}'


def is_internal(name: str) -> bool:
    "Tell whether rooms have a symbol of a name, and none of them offers it."
    rooms = {module.split(".")[1] for module in homes_of(name)}
    return bool(rooms) and all(room in ROOMS and name.split(".")[0] not in door_names(room) for room in rooms)


def folded(name: str, docs: str, blocks: list[str]) -> list[str]:
    "Fold what documents a symbol, so that only its name and the first sentence of its docstring show."
    sentence = html.escape(re.split(r"(?<=[.!?])\s", docs)[0], quote=False)
    said = re.sub(r"`([^`]*)`", r"<code>\1</code>", " ".join(sentence.split()))
    summary = f"<summary><code>{name}</code> {said}</summary>"
    return [f'<details class="internal">\n{summary}', *blocks, "</details>"]


class TableRenderer:
    "Show a symbol with a link to its source, its signature, its docstring, and tables of its parameters and methods."

    def __init__(
        self,
        sym: object,  # function, class, method or property
        name: str | None = None,  # name to show instead of its own
        title_level: int = 3,  # level of its heading
    ):
        self.symbol = unwrapped(sym)
        self.name = name or getattr(self.symbol, "__qualname__", str(self.symbol))
        self.title_level = title_level
        self.signature = signature_of(self.symbol)
        self.docs = split_docstring(self.symbol)[0]

    def _repr_markdown_(self) -> str:
        internal = is_internal(self.name)
        blocks = [
            source_link(self.name),
            f"{'#' * (self.title_level + internal)} {self.name}",  # the table of contents leaves out the fourth level
            f"```python\n{call_text(self.name, self.signature)}\n```",
            self.docs,
            table("parameters", parameter_rows(self.symbol, self.signature)),
            table("methods", method_rows(self.symbol)),
            *method_tables(self.symbol),
        ]
        shown = [block for block in blocks if block]
        return "\n\n".join(folded(self.name, self.docs, shown) if internal else ["---", *shown])

    def __repr__(self) -> str:
        return f"{call_text(self.name, self.signature)}\n{self.docs}"
