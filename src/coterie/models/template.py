"""Chat templates: a conversation to prompt text, by jinja2 in a sandbox that also meters work and memory.

A template comes with the model file and is a program. jinja2's sandbox keeps it from reaching Python; it
does not keep it from running for ever or building a string of a gigabyte. So the template's syntax tree is
rewritten before it is compiled: whatever can take long or grow passes a meter first, and what cannot be
metered is not allowed.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from coterie.errors import ModelError

MAX_SOURCE_CHARS = 1 << 17
# Steps, and characters or elements made, that one rendering may take: some, and more for a long conversation.
WORK, WORK_PER_INPUT = 4_000_000, 2_000
GROWTH, GROWTH_PER_INPUT = 2_000_000, 64
MAX_INT_BITS = 1 << 10
MAX_RANGE = 10_000

# Their time and result are bounded by what goes in, or they are written anew below.
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "max", "min", "reverse", "safe", "sort", "title",
    "trim", "unique", "upper",
)  # fmt: skip
LAZY_FILTERS = ("map", "reject", "rejectattr", "select", "selectattr")
CONSTANT_TIME_FILTERS = {"count", "d", "default", "first", "length", "safe"}
METHODS: dict[type, set[str]] = {
    str: {
        "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower",
        "isspace", "isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind",
        "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title",
        "upper",
    },
    dict: {"items", "keys", "values", "get"},
    list: {"index", "count"},
    tuple: {"index", "count"},
}  # fmt: skip
FORBIDDEN = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)


class TemplateError(jinja2.TemplateError):
    """Raised by the template itself, through raise_exception."""


class ChatTemplate:
    """A compiled chat template. Raises ModelError when it is damaged, or uses what is not allowed."""

    def __init__(self, source: str, bos_text: str, eos_text: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise ModelError(f"the chat template has {len(source)} characters, over {MAX_SOURCE_CHARS}")
        self._texts = {"bos_token": bos_text, "eos_token": eos_text}
        self._environment = _Environment()
        try:
            self._template = self._environment.compile_metered(source)
        except Exception as error:
            raise _in_one_line(error) from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation of {"role": ..., "content": ...}.

        Raises ModelError when the template refuses the conversation, fails, or wants too much work or memory.
        """
        conversation = [dict(message) for message in messages]
        try:
            self._environment.meter = meter = _Meter()
            size = meter.weight(conversation)
            meter.work_left = WORK + WORK_PER_INPUT * size
            meter.growth_left = GROWTH + GROWTH_PER_INPUT * size
            return self._template.render(
                messages=conversation, add_generation_prompt=add_generation_prompt, tools=None, **self._texts
            )
        except Exception as error:
            raise _in_one_line(error) from None


def _in_one_line(error: BaseException) -> ModelError:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, TemplateError):
        return ModelError(f"the chat template refuses this conversation: {text}")
    return ModelError(f"the chat template cannot be used: {text}; give a plain prompt instead")


class _Meter:
    """What is left of the work and growth that one rendering may take."""

    def __init__(self) -> None:
        self.work_left, self.growth_left = WORK, GROWTH

    def work(self, amount: int) -> None:
        self.work_left -= amount
        if self.work_left < 0:
            raise SecurityError("it takes too much work")

    def grow(self, amount: int) -> None:
        self.work(amount)
        self.growth_left -= amount
        if self.growth_left < 0:
            raise SecurityError("it makes too much text or data")

    def number(self, bits: int) -> None:
        if bits > MAX_INT_BITS:
            raise SecurityError("a number has too many digits")

    def weight(self, value: object) -> int:
        """Characters and elements in `value`; what occurs twice counts twice, as str() writes it."""
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            cost = 1 + len(item) if isinstance(item, (str, bytes, range, list, tuple, dict)) else 1
            total += cost
            self.work(cost)
            if isinstance(item, (list, tuple)):
                stack.extend(item)
            elif isinstance(item, dict):
                stack.extend(item)
                stack.extend(item.values())
            elif isinstance(item, Namespace):
                stack.append(item._Namespace__attrs)
            elif isinstance(item, int):
                self.number(item.bit_length())
        return total


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a meter at every operation that can take long or grow."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            finalize=_written,
        )
        self.meter = _Meter()
        self.nodes = 1
        known = self.filters
        self.filters = {name: known[name] for name in FILTERS}
        self.filters |= {name: _materialised(known[name]) for name in LAZY_FILTERS}
        self.filters |= {
            "join": _join,
            "replace": _replace,
            "indent": _indent,
            "tojson": _tojson,
            "string": _string,
        }
        self.filters |= {"_joined": _joined, "_weighed": _weighed, "_counted": _counted, "_made": _made}
        self.functions = (_range, _raise_exception, _strftime_now, dict, Namespace)
        self.globals = dict(
            zip(("range", "raise_exception", "strftime_now", "dict", "namespace"), self.functions, strict=True)
        )

    def compile_metered(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        rewrite = _Rewrite()
        rewrite.visit(tree)
        self.nodes = rewrite.nodes
        return jinja2.Template.from_code(self, self.compile(tree), dict(self.globals))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.work(1)
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "+" and not numbers:
            meter.grow(_size(left) + _size(right))
            meter.weight([left, right])
        elif operator == "*" and not numbers:
            many, times = (right, left) if isinstance(left, int) else (left, right)
            if not isinstance(times, int):
                raise SecurityError(f"cannot multiply {type(left).__name__} by {type(right).__name__}")
            meter.grow(meter.weight(many) * max(times, 0))
        elif operator == "%" and not numbers:
            raise SecurityError("formatting with % is not allowed")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            meter.number(left.bit_length() * abs(right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int):
            meter.number(result.bit_length())
        return result

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.meter.weight([list(args), kwargs])
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(function, Macro):
            self.meter.work(self.nodes)
        elif isinstance(owner, str) and name in ("replace", "join"):
            function = _join if name == "join" else _replace
            args = (context, args[0], owner) if name == "join" and args else (context, owner, *args)
            return function(*args, **kwargs)
        elif name in METHODS.get(type(owner), ()):
            self.meter.grow(_size(owner))
        elif function not in self.functions and not isinstance(owner, LoopContext):
            what = f"the undefined {function._undefined_name!r}" if isinstance(function, Undefined) else repr(name)
            raise SecurityError(f"calling {what} is not allowed")
        return _weighed(context, super().call(context, function, *args, **kwargs))


class _Rewrite(NodeTransformer):
    """Puts meters into a syntax tree."""

    def __init__(self) -> None:
        self.nodes = 0  # visited so far

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.nodes += 1
        if isinstance(node, FORBIDDEN):
            raise SecurityError(f"{type(node).__name__.lower()} is not allowed")
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("a recursive loop is not allowed")
        before = self.nodes
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), "_counted", nodes.Const(self.nodes - before))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        # Plain text is metered as an expression is, by `finalize`: a loop can repeat it.
        node.nodes = [
            _filtered(nodes.Const(child.data), "_made") if isinstance(child, nodes.TemplateData) else child
            for child in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_container(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filtered(node, "_made")

    visit_List = visit_Tuple = visit_Dict = visit_container

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "_weighed")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "_weighed")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(node, "_made")
        node.arg = _filtered(node.arg, "_weighed")
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.name.startswith("_"):
            raise SecurityError(f"no filter named {node.name!r}")
        if node.name in CONSTANT_TIME_FILTERS:
            return node
        if node.node is not None:
            node.node = _filtered(node.node, "_weighed")
        return _filtered(node, "_made")

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.args:
            node.node = _filtered(node.node, "_weighed")
            node.args = [_filtered(arg, "_weighed") for arg in node.args]
        return node


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """The body of {% generation %}, with which some templates mark answers for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# Filters. Those that take the context are never evaluated while compiling, so they meter every rendering.


def _meter(context: Context) -> _Meter:
    environment = context.environment
    assert isinstance(environment, _Environment)
    return environment.meter


def _size(value: object) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict, range)) else 1


@jinja2.pass_context
def _weighed(context: Context, value: Any) -> Any:
    """`value`, whose whole size is work to come; iterators become lists first."""
    if isinstance(value, Iterator):
        value = list(value)
    _meter(context).weight(value)
    return value


@jinja2.pass_context
def _made(context: Context, value: Any) -> Any:
    """`value`, just made."""
    value = _weighed(context, value)
    _meter(context).grow(1 + _size(value))
    return value


@jinja2.pass_context
def _counted(context: Context, values: Iterable[Any], cost: int) -> Iterator[Any]:
    """`values` one by one, each at the cost of a loop's body."""
    meter = _meter(context)
    for value in values:
        meter.work(cost)
        yield value


@jinja2.pass_context
def _string(context: Context, value: Any) -> str:
    """As str(value)."""
    meter = _meter(context)
    meter.grow(meter.weight(value) * (1 if isinstance(value, str) else 4))
    return str(value)


@jinja2.pass_context
def _written(context: Context, value: Any) -> str:
    return _string(context, value)


@jinja2.pass_context
def _joined(context: Context, values: list[Any]) -> str:
    """The operator `~`."""
    return "".join([_string(context, value) for value in values])


@jinja2.pass_context
def _join(context: Context, values: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        values = [context.environment.getitem(value, attribute) for value in values]
    texts = [_string(context, value) for value in values]
    _meter(context).grow(len(texts) * len(str(separator)))
    return str(separator).join(texts)


@jinja2.pass_context
def _replace(context: Context, text: Any, old: Any, new: Any, count: int = -1) -> str:
    whole, part, other = (str(_string(context, value)) for value in (text, old, new))
    _meter(context).grow((whole.count(part) + 1) * len(other))
    return whole.replace(part, other, -1 if count is None else count)


@jinja2.pass_context
def _indent(context: Context, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = _string(context, text)
    space = width if isinstance(width, str) else " " * min(max(width, 0), 64)
    lines = text.splitlines()
    _meter(context).grow((len(lines) + 1) * (len(space) + 1))
    head, *rest = lines or [""]
    body = [head, *(space + line if line or blank else line for line in rest)]
    return (space if first else "") + "\n".join(body)


@jinja2.pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    meter = _meter(context)
    meter.grow(8 * meter.weight(value))
    indent = None if indent is None else min(max(int(indent), 0), 16)
    if separators is not None and sum(map(len, separators)) > 16:
        raise SecurityError("tojson: these separators are not allowed")
    encoder = json.JSONEncoder(
        ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )
    chunks = []
    for chunk in encoder.iterencode(value):
        meter.grow(len(chunk))
        chunks.append(chunk)
    return "".join(chunks)


def _materialised(lazy: Callable[..., Iterable[Any]]) -> Callable[..., list[Any]]:
    """A filter that yields its results lazily, as one that returns a list: only that can be metered."""

    @jinja2.pass_context
    def listed(context: Context, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
        return list(lazy(context, _weighed(context, value), *args, **kwargs))

    return listed


# Functions.


def _range(*limits: int) -> range:
    values = range(*limits)
    if len(values) > MAX_RANGE:
        raise SecurityError(f"a range of {len(values)} is too long; {MAX_RANGE} are allowed")
    return values


def _raise_exception(message: object = "no reason given") -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if not re.fullmatch(r"(%-?[A-Za-z%]|[^%]){0,64}", form):
        raise SecurityError("strftime_now: this format is not allowed")
    return datetime.now().strftime(form)
