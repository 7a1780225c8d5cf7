"""Chat templates compiled so that a stranger's can do no harm: bounded in time, in memory, in what they may call.

The only importer of Jinja. The library's sandbox keeps a template from Python's internals; it bounds neither loops nor
texts (`"a" * 10**9`). So here whatever makes a value (an operator, a filter, a call, a literal) counts what it makes,
and refuses before it makes too much; loops and calls look at the clock. No value is larger than what may be made in
all, also where a list holds another one many times: so each single step is short. Knows nothing of messages.
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
"""Characters of a template: several times the longest that is published."""
MAX_RENDERED_SIZE: Final = 32_000_000
"""Characters, or as many entries of lists, that one rendering may make in all."""
RENDER_LIMIT_S: Final = 1.0
"""Processor time of one rendering."""
MAX_WIDTH: Final = 1000
"""Of an indentation, of a number that is written in columns, and the like."""
MAX_INTEGER_BITS: Final = 4096
"""Of an integer."""
MAX_ERROR_LENGTH: Final = 300
"""Characters of an error that a template raises."""
VALUE_SIZE: Final = 16
"""What a value counts besides its characters, about as many bytes as the least one takes."""

ESCAPED_TAINT_MARK: Final = re.compile("|".join(rf"\\u{code:04x}" for code in NONCHARACTERS))
_LONG_NUMBER: Final = re.compile(r"\d{4}|\*|\{[^{}]*\{")
"""A width or precision in a format that is long, or given as a value."""

_BOUNDED_METHODS: Final = frozenset({
    "as_integer_ratio", "bit_length", "capitalize", "casefold", "copy", "count", "difference", "endswith", "find",
    "fromkeys", "get", "hex", "index", "intersection", "is_integer", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "isdisjoint", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "issubset", "issuperset",
    "istitle", "isupper", "items", "keys", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind",
    "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
    "union", "upper", "values",
})  # fmt: skip
"""Methods of Python's own values that make no more than they are given."""
_JINJA_ARGUMENTS: Final = frozenset({"_loop_vars", "_block_vars"})
"""What Jinja gives besides."""
_WIDENING_METHODS: Final = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_REMOVED_FILTERS: Final = frozenset({"urlize", "wordwrap", "xmlattr", "striptags"})
"""Filters for pages of the web, of which some take long for short texts."""
_WIDE_FILTERS: Final = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "truncate"})


class Template:
    """A compiled template. Safe to use from several threads.

    Raises `ValueError`, in one line, for a source that is no valid template or too long.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE_LENGTH:
            raise ValueError(f"it has {len(source)} characters, the limit is {MAX_SOURCE_LENGTH}")
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # Jinja's own errors, and Python's for what is nested too deeply
            raise ValueError(" ".join(str(error).split())[:MAX_ERROR_LENGTH] or type(error).__name__) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text. Raises `TemplateLimitError`, and whatever else a template can raise."""
        with self._environment.budget.begun():
            return "".join(self._template.generate(**variables))


class _RenderBudget(threading.local):
    """What a rendering may still do, a thread's own."""

    remaining = MAX_RENDERED_SIZE
    deadline_s = 0.0
    _calls = 0

    def begun(self) -> _RenderBudget:
        """Begin anew."""
        self.remaining, self.deadline_s = MAX_RENDERED_SIZE, time.thread_time() + RENDER_LIMIT_S
        return self

    def __enter__(self) -> _RenderBudget:
        return self

    def __exit__(self, *_: object) -> None:
        self.deadline_s = 0.0

    def check_time(self) -> None:
        """Look at the clock now and then. Without a rendering, as when a template is compiled, there is none."""
        self._calls += 1
        if self._calls % 32 == 0 and self.deadline_s and time.thread_time() > self.deadline_s:
            raise TemplateLimitError(f"it takes longer than {RENDER_LIMIT_S:g} s")

    def check(self, size: float) -> None:
        """Refuse to make so much."""
        self.check_time()
        if size > self.remaining:
            raise TemplateLimitError(f"it makes more than {MAX_RENDERED_SIZE / 1e6:.0f} million characters")

    def spend(self, size: float) -> None:
        """Count what was made."""
        self.check(size)
        self.remaining -= int(size)

    def measure(self, *values: Any) -> int:
        """Return about how many characters values have when they are written. Refuses those that are too large."""
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

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """Return what an iterator yields, counted."""
        found = []
        for value in values:
            self.spend(VALUE_SIZE)
            found.append(value)
        return found

    def counted(self, values: Any) -> Any:
        """Return a loop's values, one at a time."""
        if isinstance(values, Iterator):
            return (self._ticked(value) for value in values)
        if isinstance(values, jinja2.Undefined) or not hasattr(values, "__len__"):
            return values
        return _Counted(self, values)

    def _ticked(self, value: Any) -> Any:
        self.check_time()
        return value


class _Counted:
    """What has a length, with a look at the clock for each of its values."""

    def __init__(self, budget: _RenderBudget, values: Any) -> None:
        self._budget, self._values = budget, values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._budget.check_time()
            yield value


class _Generator(CodeGenerator):
    """Writes `~` as an operator that is counted."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  Jinja's name
        self.write("environment.concatenate((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class _Bounding(NodeTransformer):
    """Has loops, literals and constant texts counted."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node, *args, **kwargs)
        node.iter = _filter(node.iter, "_counted")
        return node

    def _literal(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        return node if getattr(node, "ctx", "load") != "load" else _filter(node, "_made")

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815

    def visit_TemplateData(self, node: nodes.TemplateData, *_args: Any, **_kwargs: Any) -> nodes.Node:  # noqa: N802
        return nodes.Const(node.data, lineno=node.lineno)  # a loop may repeat it, where a macro collects its texts


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """Allows `{% generation %}`, which marks what is trained on; here its body counts as it stands."""

    tags = {"generation"}  # noqa: RUF012  so jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers sets Jinja up, so that templates written for it work unchanged, with limits."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            optimized=False,  # nothing is computed before there are limits
            finalize=pass_context(lambda _context, value: self.count_output(value)),
        )
        self.budget = _RenderBudget()
        known = {name: each for name, each in self.filters.items() if name not in _REMOVED_FILTERS}
        self.filters = {name: self._bounded(name, each) for name, each in {**known, "tojson": _to_json}.items()}
        self.filters["_counted"] = self.budget.counted
        self.filters["_made"] = self._made
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed: nodes.Template = _Bounding().visit(super()._parse(source, name, filename))
        return parsed

    # -- what makes values -------------------------------------------------------------------------------------

    def count_output(self, value: Any) -> Any:
        """Count what is written."""
        self.budget.spend(len(value) if isinstance(value, str) else self.budget.measure(value))
        return value

    def concatenate(self, values: tuple[Any, ...]) -> str:
        """Return what `~` makes."""
        self.budget.spend(self.budget.measure(*values))
        return "".join(map(str, values))

    def _made(self, value: Any) -> Any:
        self.budget.spend(self.budget.measure(value))
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See Jinja."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if numbers and operator in ("+", "%"):
            return super().call_binop(context, operator, left, right)
        if numbers:
            bits = [n.bit_length() if isinstance(n, int) else 64 for n in (left, right)]
            power = bits[0] * (abs(right) if operator == "**" else 1) + bits[1]
            if power > MAX_INTEGER_BITS and isinstance(left, int) and isinstance(right, int):
                raise TemplateLimitError("it computes with integers that are too long")
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
        """See Jinja; refuses methods that could make much of little."""
        self.budget.check_time()
        method = getattr(called, "__wrapped__", called)  # Jinja wraps `format` of texts
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes, bytearray, int, float, complex, list, tuple, Mapping, set, frozenset, range)):
            self._check_method(owner, name, given, {key: named[key] for key in named.keys() - _JINJA_ARGUMENTS})
        elif called is not _raise_exception:
            self.budget.measure(given, named)
        made = super().call(context, called, *given, **named)
        if isinstance(made, str):
            self.budget.spend(len(made))
        elif isinstance(made, (list, tuple, dict, set, frozenset, Namespace, int)):
            self.budget.spend(self.budget.measure(made))
        return made

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
                raise TemplateLimitError("join takes a list here: write `| join(...)`")
            self.budget.check(self.budget.measure(given[0]) + len(owner) * len(given[0]))
        elif name in ("format", "format_map") and isinstance(owner, str):
            self._check_format(owner, "{", [*given, *named.values()])
        else:
            raise TemplateLimitError(f"it calls {name} of a value, which a template may not")

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str):
            self.budget.check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    def _check_format(self, text: str, sign: str, values: Any) -> None:
        """Refuse a format that writes wide columns, or its values too often."""
        if _LONG_NUMBER.search(text):
            raise TemplateLimitError("it formats numbers with more places than a template may")
        self.budget.spend(len(text) + (1 + text.count(sign)) * (self.budget.measure(values) + MAX_WIDTH))

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that counts what it is given and what it makes."""
        budget, first = self.budget, 1 if hasattr(function, "jinja_pass_arg") else 0

        def bounded(*given: Any, **named: Any) -> Any:
            budget.check_time()
            given = tuple(budget.listed(each) if isinstance(each, Iterator) else each for each in given)
            values = [*given[first:], *named.values()]
            size = budget.measure(*values)
            if name in _WIDE_FILTERS:
                widths = [abs(n) if isinstance(n, int) else len(n) for n in values[1:] if isinstance(n, int | str)]
                if max(widths, default=0) > MAX_WIDTH:
                    raise TemplateLimitError(f"it gives {name} a number above {MAX_WIDTH}")
                widest = max([1, *widths])
                budget.check(widest * _lines(values[0], name))
            elif name == "replace" and len(values) >= 3:
                self._check_replace(str(values[0]), *values[1:3])
            elif name == "format" and values:
                self._check_format(str(values[0]), "%", values[1:])
            elif name == "join" and values:
                count = len(values[0]) if hasattr(values[0], "__len__") else 1
                budget.check(size + count * sum(len(each) for each in values[1:] if isinstance(each, str)))
            made = function(*given, **named)
            budget.spend(len(made) if isinstance(made, str) else budget.measure(made))
            return made

        for attribute in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, attribute):
                setattr(bounded, attribute, getattr(function, attribute))
        return bounded


def _lines(value: Any, name: str) -> int:
    """Return about how many lines or columns a filter makes of a value."""
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
    """Return JSON; Jinja's own filter escapes HTML. Signs of `edgelm.text.tainted_text` stay what they are."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return ESCAPED_TAINT_MARK.sub(lambda found: chr(int(found[0][2:], 16)), text) if ensure_ascii else text


def _raise_exception(message: Any) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    if not isinstance(form, str) or len(form) > MAX_WIDTH or re.search(r"%[^a-zA-Z%]*\d", form):
        raise TemplateLimitError("it gives strftime_now a format that is too long or has widths")
    return datetime.now().strftime(form)
