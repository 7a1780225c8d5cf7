"""Untrusted chat templates stay within limits or are refused; published ones render as in Jinja."""

from __future__ import annotations

import threading
import time
import tracemalloc

import pytest
from fuzzing.files import TEMPLATES

from edgelm.errors import RequestError, TemplateLimitError
from edgelm.text import template_sandbox
from edgelm.text.chat_template import ChatTemplate
from edgelm.text.template_sandbox import Template

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "play <eos> music"}]
GROW = "{% set ns = namespace(s='ab', l=[1]) %}{% for i in range(70) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s | length }}"
MAX_CPU_S = 5 * template_sandbox.RENDER_LIMIT_S
"""A single step may be running when the time limit is reached."""

TOO_LONG = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{% set a = range(9999) | list %}{% for i in range(99999) %}{% if a | sort | length %}{% endif %}{% endfor %}",
    "lazy filters": "{% for i in range(9999) %}{% for x in range(9999) | map('string') %}{% endfor %}{% endfor %}",
    "recursion": "{% for x in [1] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "a generation block": "{% generation %}{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{% endgeneration %}",
}
TOO_MUCH = {
    "times": "{{ 'a' * 10**9 }}",
    "times a list": "{{ ([0] * 10**9) | length }}",
    "times by steps": "{{ ('a' * 10**4 * 10**5) | length }}",
    "plus": GROW.replace("STEP", "ns.s + ns.s"),
    "plus of lists": GROW.replace("'ab'", "[1]").replace("STEP", "ns.s + ns.s"),
    "tilde": GROW.replace("STEP", "ns.s ~ ns.s"),
    "format": GROW.replace("STEP", "'%s%s' % (ns.s, ns.s)"),
    "format's method": GROW.replace("STEP", "'{}{}'.format(ns.s, ns.s)"),
    "format's filter": GROW.replace("STEP", "'%s%s' | format(ns.s, ns.s)"),
    "format again and again": "{{ ('{0}' * 99999).format('x' * 99999) | length }}",
    "replace": GROW.replace("STEP", "ns.s.replace('a', ns.s)"),
    "replace's filter": GROW.replace("STEP", "ns.s | replace('a', ns.s)"),
    "replace nothing": "{{ ('a' * 99999).replace('', 'x' * 99999) | length }}",
    "join": GROW.replace("STEP", "ns.s.join([ns.s, ns.s])"),
    "join's filter": GROW.replace("STEP", "[ns.s, ns.s] | join"),
    "join's separator": "{{ range(99999) | join('x' * 99999) | length }}",
    "join of a shared text": "{% set a = ['x' * 99999] * 9999 %}{{ ''.join(a) | length }}",
    "write a shared text": "{% set a = ['x' * 99999] * 9999 %}{{ a }}",
    "JSON of a shared text": "{% set a = ['x' * 99999] * 9999 %}{{ a | tojson | length }}",
    "lists in lists": GROW.replace("STEP", "[ns.s, ns.s]"),
    "compare lists in lists": GROW.replace("STEP", "[ns.s, ns.s]").replace("{{ ns.s | length }}", "{{ ns.s == ns.s }}"),
    "width": "{{ 'a'.ljust(10**10) }}",
    "width of a filter": "{{ 'x' | center(10**9) }}",
    "width of a number": "{{ '%1000000000d' % 1 }}",
    "width in a format": "{{ '{:>1000000000}'.format('x') }}",
    "width given": "{{ '%*d' % (10**9, 1) }}",
    "width given in a format": "{{ '{:>{}}'.format('x', 10**9) }}",
    "tabs": "{{ '\t\t'.expandtabs(10**9) }}",
    "indentation": "{{ 'x\n' * 1000 | indent(10**9) }}",
    "JSON's indentation": "{{ [1] | tojson(indent=10**9) }}",
    "batches": "{{ [1] | batch(10**9, 'x') | list }}",
    "slices": "{{ [1] | slice(10**9) | list }}",
    "places": "{{ 1 | round(10**9) }}",
    "power": "{{ 9**(9**9) }}",
    "power by steps": GROW.replace("'ab'", "10**9").replace("STEP", "ns.s * ns.s"),
    "bytes": "{{ (0).to_bytes(10**9, 'big') }}",
    "encoded": "{{ 'a'.encode('utf-8') * 10**9 }}",
    "translated": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "text of a loop": "{% set x %}{% for i in range(99999) %}{{ 'y' * 999 }}{% endfor %}{% endset %}{{ x | length }}",
    "constant text of a loop": "{% set x %}{% for i in range(9999) %}" + "y" * 50_000 + "{% endfor %}{% endset %}",
    "text of a macro": "{% macro f() %}{% for i in range(9999) %}"
    + "y" * 50_000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "text of a filter": "{% filter upper %}{% for i in range(99999) %}{{ 'y' * 9999 }}{% endfor %}{% endfilter %}",
    "the answer": "{% for i in range(99999) %}{{ 'y' * 9999 }}{% endfor %}",
    "date": "{{ strftime_now('%999999999d') }}",
    "integers": "{% set ns = namespace(n=1) %}{% for i in range(99999) %}{% set ns.n = ns.n * 1000000007 %}{% endfor %}",
}


def seconds_and_bytes(source: str) -> tuple[float, int, str]:
    """Return CPU seconds, peak bytes and the error of a template."""
    tracemalloc.start()
    begun = time.thread_time()
    try:
        Template(source).render({"messages": MESSAGES})
        message = ""
    except Exception as error:  # noqa: BLE001  a template can raise any exception
        message = f"{type(error).__name__}: {error}"
    took, peak = time.thread_time() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return took, peak, message


@pytest.mark.parametrize("kind", TOO_LONG)
def test_a_slow_template_is_stopped(kind):
    took, _, message = seconds_and_bytes(TOO_LONG[kind])
    assert message.startswith("TemplateLimitError: ")
    assert message.endswith("1 s")
    assert took < MAX_CPU_S


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_template_with_large_values_is_stopped(kind):
    took, most, message = seconds_and_bytes(TOO_MUCH[kind])
    assert message.startswith("TemplateLimitError: ") or "integer" in message, message
    assert most < 8 * template_sandbox.MAX_RENDERED_SIZE, f"{most / 1e6:.0f} MB"
    assert took < MAX_CPU_S


def test_the_fuzzer_s_templates_stay_within_the_limits():
    """All in one process, one after another."""
    for source in TEMPLATES[::3]:
        took, most, _ = seconds_and_bytes(source)
        assert took < MAX_CPU_S, source[:100]
        assert most < 8 * template_sandbox.MAX_RENDERED_SIZE, source[:100]


@pytest.mark.parametrize(
    "source", ["{{ 1 }}" * 60_000, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "-" * 9000 + "1 }}", "{% if"]
)
def test_an_invalid_or_too_long_template_is_not_compiled(source):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        Template(source)


def test_a_template_that_is_slow_for_a_short_text_is_not_run_again():
    template = ChatTemplate(TOO_LONG["loops"], {})
    for _ in range(20):
        begun = time.thread_time()
        with pytest.raises(RequestError, match="1 s") as caught:
            template.render(MESSAGES)
        took = time.thread_time() - begun
    assert caught.value.code == "bad_request"
    assert took < template_sandbox.RENDER_LIMIT_S / 2


def test_each_thread_and_each_rendering_has_its_own_limits():
    """The size of one rendering does not count for the next one, nor for a concurrent one."""
    template = Template("{% for i in range(50) %}{{ 'x' * 99999 }}{% endfor %}")
    lengths = []

    def render():
        lengths.extend(len(template.render({})) for _ in range(4))

    threads = [threading.Thread(target=render) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 2 * 50 * 99999 < template_sandbox.MAX_RENDERED_SIZE < 4 * 2 * 50 * 99999
    assert lengths == [50 * 99999] * 12


def test_a_long_error_of_a_template_is_cut():
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ raise_exception('x' * 99999) }}", {}).render(MESSAGES)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'ab' * 3 + 'c' ~ 1 ~ none }}", "abababc1None"),
        ("{{ [1, 2] + [3] }}{{ (1, 2) }}{{ {'a': [1]} }}", "[1, 2, 3](1, 2){'a': [1]}"),
        ("{{ '%s is %d' % ('x', 3) }}|{{ '{:>4}'.format(7) }}|{{ '%.2f' | format(1.5) }}", "x is 3|   7|1.50"),
        (
            "{{ 'a b'.split() }}{{ ' x '.strip() }}{{ 'ab'.replace('a', 'c') }}{{ ', '.join(['a', 'b']) }}",
            "['a', 'b']xcba, b",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{{ loop.last }}{{ loop.length }}{% endfor %}", "a=1True1"),
        ("{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role }}{% else %}none{% endfor %}", "0user1system"),
        ("{% for m in nothing %}{{ m }}{% else %}none{% endfor %}", "none"),
        (
            "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ m.content }}{% endfor %}",
            "play <eos> music",
        ),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user"),
        (
            "{% for x in [[1, [2]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
            "(1(2))",
        ),
        ("{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}", "4"),
        ("{% set a, b = 1, 2 %}{{ a }}{{ b }}{% macro f(x, y=2) %}<{{ x }}{{ y }}>{% endmacro %}{{ f(1) }}", "12<12>"),
        ("{{ messages | tojson(indent=2) | length }}", "122"),
        ("{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 1.5 * 2 }}{{ 7 / 2 }}", "3310243.03.5"),
        (
            "{{ ['b', 'a'] | sort | first }}{{ 'x' | default('y') }}{{ nothing | default('y') }}{{ range(3) | list }}",
            "axy[0, 1, 2]",
        ),
    ],
)
def test_a_template_renders_as_in_jinja(source, text):
    assert Template(source).render({"messages": MESSAGES}) == text


def test_a_limit_error_is_an_edgelm_error():
    assert issubclass(TemplateLimitError, RequestError.__mro__[1])
