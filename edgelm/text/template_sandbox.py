"""Compiles untrusted chat templates and limits their time, their memory and the methods that they call.

The only importer of Jinja. Jinja's sandbox blocks access to Python's internals, but limits neither loops nor texts
(`"a" * 10**9`). Here each operator, filter, call and literal counts the size of its result, and raises before the
result is too large; loops and calls check the time. No value is larger than the limit of one rendering, also if a list
contains another list many times, so every single step is short. Knows nothing of messages.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from edgelm.errors import TemplateLimitError
from edgelm.text.tainted_text import NONCHARACTERS

MAX_SOURCE_LENGTH: Final = 100_000
"""Characters of a template: several times the longest published one."""
MAX_RENDERED_SIZE: Final = 32_000_000
"""Total size that one rendering may produce: characters, and `VALUE_SIZE` for each value."""
RENDER_LIMIT_S: Final = 1.0
"""CPU time of one rendering, in seconds."""
MAX_WIDTH: Final = 1000
"""Largest width of an indentation, a padded number and the like, in characters."""
MAX_INTEGER_BITS: Final = 4096
"""Largest integer that a template may compute, in bits."""
MAX_ERROR_LENGTH: Final = 300
"""Characters of Jinja's error that our error quotes."""
VALUE_SIZE: Final = 16
"""Size counted for each value besides its characters; about the bytes of the smallest value."""

ESCAPED_TAINT_MARK: Final = re.compile("|".join(rf"\\u{code:04x}" for code in NONCHARACTERS))
_LONG_NUMBER: Final = re.compile(r"\d{4}|\*|\{[^{}]*\{")
"""A width or precision of four digits, or one given as a value, in a format."""

_BOUNDED_METHODS: Final = frozenset({
    "as_integer_ratio", "bit_length", "capitalize", "casefold", "copy", "count", "difference", "endswith", "find",
    "fromkeys", "get", "hex", "index", "intersection", "is_integer", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "isdisjoint", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "issubset", "issuperset",
    "istitle", "isupper", "items", "keys", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind",
    "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
    "union", "upper", "values",
})  # fmt: skip
"""Methods of Python's built-in types whose result is no larger than their input."""
_JINJA_ARGUMENTS: Final = frozenset({"_loop_vars", "_block_vars"})
"""Arguments that Jinja adds to calls."""
_WIDENING_METHODS: Final = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_REMOVED_FILTERS: Final = frozenset({"urlize", "wordwrap", "xmlattr", "striptags"})
"""Filters for web pages; some are slow for short texts."""
_WIDE_FILTERS: Final = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "truncate"})


class Template:
    """A compiled template. Safe to use from several threads.

    Raises `ValueError` with a one-line message if the source is not a valid template or too long.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE_LENGTH:
            raise ValueError(f"it has {len(source)} characters, the limit is {MAX_SOURCE_LENGTH}")
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # Jinja's errors, and RecursionError for deep nesting
            raise ValueError(" ".join(str(error).split())[:MAX_ERROR_LENGTH] or type(error).__name__) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text. Raises `TemplateLimitError`, and any exception that the template causes."""
        with self._environment.budget.reset():
            return "".join(self._template.generate(**variables))


class _RenderBudget(threading.local):
    """Remaining size and time of the current rendering, per thread."""

    remaining = MAX_RENDERED_SIZE
    deadline_s = 0.0
    _calls = 0

    def reset(self) -> _RenderBudget:
        """Start the budget of a new rendering."""
        self.remaining, self.deadline_s = MAX_RENDERED_SIZE, time.thread_time() + RENDER_LIMIT_S
        return self

    def __enter__(self) -> _RenderBudget:
        return self

    def __exit__(self, *_: object) -> None:
        self.deadline_s = 0.0

    def check_time(self) -> None:
        """Check the time at every 32nd call. While a template is compiled there is no time limit."""
        self._calls += 1
        if self._calls % 32 == 0 and self.deadline_s and time.thread_time() > self.deadline_s:
            raise TemplateLimitError(f"it takes longer than {RENDER_LIMIT_S:g} s")

    def check(self, size: float) -> None:
        """Raise `TemplateLimitError` if a value of this size exceeds the budget."""
        self.check_time()
        if size > self.remaining:
            raise TemplateLimitError(f"it produces more than {MAX_RENDERED_SIZE / 1e6:.0f} million characters")

    def spend(self, size: float) -> None:
        """Subtract the size of a new value from the budget."""
        self.check(size)
        self.remaining -= int(size)

    def measure(self, *values: Any) -> int:
        """Return the approximate number of characters of written values. Raises if they are too large."""
        total, waiting = 0, list(values)
        while waiting:
            value = waiting.pop()
            total += VALUE_SIZE
            if isinstance(value, (str, bytes)):
                total += len(value)
            elif isinstance(value, Mapping):
                waiting += itertools.chain(value.keys(), value.values())
            elif isinstance(value, int):
                total += value.bit_length() // 3
                if value.bit_length() > MAX_INTEGER_BITS:
                    raise TemplateLimitError(f"it computes an integer of {value.bit_length()} bits")
            elif isinstance(value, range):
                total += VALUE_SIZE * len(value)
            elif isinstance(value, Namespace):
                waiting.append(object.__getattribute__(value, "_Namespace__attrs"))
            elif isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__.startswith("dict_"):
                total += VALUE_SIZE * len(value) if len(value) > 1000 else 0
                self.check(total)
                waiting += value
            self.check(total)
        return total

    def collect(self, values: Iterable[Any]) -> list[Any]:
        """Return an iterator's values as a list and count them."""
        found = []
        for value in values:
            self.spend(VALUE_SIZE)
            found.append(value)
        return found

    def time_loop(self, values: Any) -> Any:
        """Return a loop's values with a time check for each one."""
        if isinstance(values, Iterator):
            return (self._check_time_for(value) for value in values)
        if isinstance(values, jinja2.Undefined) or not hasattr(values, "__len__"):
            return values
        return _TimedValues(self, values)

    def _check_time_for(self, value: Any) -> Any:
        self.check_time()
        return value


class _TimedValues:
    """A sized collection that checks the time for each value of an iteration."""

    def __init__(self, budget: _RenderBudget, values: Any) -> None:
        self._budget, self._values = budget, values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._budget.check_time()
            yield value


class _Generator(CodeGenerator):
    """Compiles `~` to a call of `concatenate`, which counts its result."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  Jinja's name
        self.write("environment.concatenate((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class _LimitInserter(NodeTransformer):
    """Inserts time checks into loops, and size counts for literals and constant texts."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node, *args, **kwargs)
        node.iter = _filter(node.iter, "_time_loop")
        return node

    def _literal(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        return node if getattr(node, "ctx", "load") != "load" else _filter(node, "_count_literal")

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815

    def visit_TemplateData(self, node: nodes.TemplateData, *_args: Any, **_kwargs: Any) -> nodes.Node:  # noqa: N802
        # Output of a constant is counted, output of template text is not: a loop in a macro may repeat it.
        return nodes.Const(node.data, lineno=node.lineno)


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationTag(Extension):
    """Accepts `{% generation %}`, which marks training text, and renders its body unchanged."""

    tags = {"generation"}  # noqa: RUF012  so jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja configured as in transformers, so that its templates work unchanged, with limits added."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            optimized=False,  # else constants are computed at compile time, without limits
            finalize=pass_context(lambda _context, value: self.count_output(value)),
        )
        self.budget = _RenderBudget()
        known = {name: each for name, each in self.filters.items() if name not in _REMOVED_FILTERS}
        self.filters = {name: self._bounded(name, each) for name, each in {**known, "tojson": _to_json}.items()}
        self.filters["_time_loop"] = self.budget.time_loop
        self.filters["_count_literal"] = self._count_literal
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _LimitInserter().visit(super()._parse(source, name, filename))
        return parsed

    # --- operations that create values ---

    def count_output(self, value: Any) -> Any:
        """Count a value that is written to the output, and return it."""
        self.budget.spend(len(value) if isinstance(value, str) else self.budget.measure(value))
        return value

    def concatenate(self, values: tuple[Any, ...]) -> str:
        """Return the result of `~`, and count it."""
        self.budget.spend(self.budget.measure(*values))
        return "".join(map(str, values))

    def _count_literal(self, value: Any) -> Any:
        self.budget.spend(self.budget.measure(value))
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator (Jinja's hook), with its result counted or limited before."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if numbers and operator in ("+", "%"):
            return super().call_binop(context, operator, left, right)
        if numbers:
            bits = [n.bit_length() if isinstance(n, int) else 64 for n in (left, right)]
            power = bits[0] * (abs(right) if operator == "**" else 1) + bits[1]
            if power > MAX_INTEGER_BITS and isinstance(left, int) and isinstance(right, int):
                raise TemplateLimitError(f"it computes an integer of more than {MAX_INTEGER_BITS} bits")
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and times > 0:
                self.budget.spend(
                    times * (len(value) if isinstance(value, str | bytes) else self.budget.measure(value))
                )
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, "%", right)
        else:
            self.budget.spend(self.budget.measure(left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, /, *given: Any, **named: Any) -> Any:
        """Call a function or method (Jinja's hook); refuse methods that could turn small values into large ones."""
        self.budget.check_time()
        method = getattr(called, "__wrapped__", called)  # Jinja wraps `format` of texts
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes, bytearray, int, float, complex, list, tuple, Mapping, set, frozenset, range)):
            self._check_method(owner, name, given, {key: named[key] for key in named.keys() - _JINJA_ARGUMENTS})
        elif called is not _raise_exception:
            self.budget.measure(given, named)
        result = super().call(context, called, *given, **named)
        if isinstance(result, str):
            self.budget.spend(len(result))
        elif isinstance(result, (list, tuple, dict, set, frozenset, Namespace, int)):
            self.budget.spend(self.budget.measure(result))
        return result

    def _check_method(self, owner: Any, name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if name in _BOUNDED_METHODS:
            return
        if name in _WIDENING_METHODS:
            width = next((n for n in (*given, *named.values()) if isinstance(n, int)), 8)
            self.budget.check(len(owner) + (owner.count("\t") if name == "expandtabs" else 1) * abs(width))
        elif name == "replace" and isinstance(owner, str) and len(given) >= 2:
            self._check_replace(owner, *given[:2])
        elif name == "join" and given and isinstance(owner, str):
            if isinstance(given[0], Iterator):
                raise TemplateLimitError("the method join needs a list: write `| join(...)`")
            self.budget.check(self.budget.measure(given[0]) + len(owner) * len(given[0]))
        elif name in ("format", "format_map") and isinstance(owner, str):
            self._check_format(owner, "{", [*given, *named.values()])
        else:
            raise TemplateLimitError(f"it calls the method {name}, which is not allowed in templates")

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.budget.check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    def _check_format(self, text: str, sign: str, values: Any) -> None:
        """Raise `TemplateLimitError` for a format with wide columns or with too large a result."""
        if _LONG_NUMBER.search(text):
            raise TemplateLimitError("it formats with a width or precision of four digits, or one given as a value")
        self.budget.spend(len(text) + (1 + text.count(sign)) * (self.budget.measure(values) + MAX_WIDTH))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks the size of its input and counts its result."""
        budget, first = self.budget, 1 if hasattr(function, "jinja_pass_arg") else 0

        def bounded(*given: Any, **named: Any) -> Any:
            budget.check_time()
            given = tuple(budget.collect(each) if isinstance(each, Iterator) else each for each in given)
            values = [*given[first:], *named.values()]
            size = budget.measure(*values)
            if name in _WIDE_FILTERS:
                widths = [abs(n) if isinstance(n, int) else len(n) for n in values[1:] if isinstance(n, int | str)]
                if max(widths, default=0) > MAX_WIDTH:
                    raise TemplateLimitError(f"it passes {name} a number above {MAX_WIDTH}")
                widest = max([1, *widths])
                budget.check(widest * _count_lines(values[0], name))
            elif name == "replace" and len(values) >= 3:
                self._check_replace(str(values[0]), *values[1:3])
            elif name == "format" and values:
                self._check_format(str(values[0]), "%", values[1:])
            elif name == "join" and values:
                count = len(values[0]) if hasattr(values[0], "__len__") else 1
                budget.check(size + count * sum(len(each) for each in values[1:] if isinstance(each, str)))
            result = function(*given, **named)
            budget.spend(len(result) if isinstance(result, str) else budget.measure(result))
            return result

        for attribute in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, attribute):
                setattr(bounded, attribute, getattr(function, attribute))
        return bounded


def _count_lines(value: Any, name: str) -> int:
    """Return the approximate number of lines or columns that a filter produces from a value."""
    if isinstance(value, str):
        return value.count("\n") + 2
    if name == "tojson":
        count, waiting, depth = 0, [value], 0
        while waiting and depth < MAX_WIDTH:
            depth += 1
            count += len(waiting) * depth
            level, waiting = waiting, []
            for each in level:
                if isinstance(each, Mapping):
                    waiting += each.values()
                elif isinstance(each, (list, tuple)):
                    waiting += each
        return count
    return 2


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without HTML escapes, which Jinja's own filter adds. Marks of `tainted_text` stay unescaped."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return ESCAPED_TAINT_MARK.sub(lambda found: chr(int(found[0][2:], 16)), text) if ensure_ascii else text


def _raise_exception(message: Any) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    if not isinstance(form, str) or len(form) > MAX_WIDTH or re.search(r"%[^a-zA-Z%]*\d", form):
        raise TemplateLimitError("it passes strftime_now a format that is too long or has widths")
    return datetime.now().strftime(form)
