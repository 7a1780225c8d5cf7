"""A stranger's chat template is rendered within bounds or refused, and one that people publish as Jinja renders it."""

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
PROCESSOR_S = 5 * template_sandbox.RENDER_LIMIT_S
"""A single step may be under way when the time is over."""

TOO_LONG = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{% set a = range(9999) | list %}{% for i in range(99999) %}{% if a | sort | length %}{% endif %}{% endfor %}",
    "lazy filters": "{% for i in range(9999) %}{% for x in range(9999) | map('string') %}{% endfor %}{% endfor %}",
    "recursion": "{% for x in [1] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "a body that is marked": "{% generation %}{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{% endgeneration %}",
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
    """Return processor seconds, most bytes, and the error of a template."""
    tracemalloc.start()
    begun = time.thread_time()
    try:
        Template(source).render({"messages": MESSAGES})
        said = ""
    except Exception as error:  # noqa: BLE001  whatever a template raises
        said = f"{type(error).__name__}: {error}"
    took, most = time.thread_time() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return took, most, said


@pytest.mark.parametrize("kind", TOO_LONG)
def test_one_that_takes_long_is_stopped(kind):
    took, _, said = seconds_and_bytes(TOO_LONG[kind])
    assert said == "TemplateLimitError: it takes longer than 1 s"
    assert took < PROCESSOR_S


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_one_that_makes_much_is_stopped(kind):
    took, most, said = seconds_and_bytes(TOO_MUCH[kind])
    assert said.startswith("TemplateLimitError: it ") or "integer" in said, said
    assert most < 8 * template_sandbox.MAX_RENDERED_SIZE, f"{most / 1e6:.0f} MB"
    assert took < PROCESSOR_S


def test_whatever_the_fuzzer_knows_is_short():
    """One after another in one process, with the same limits."""
    for source in TEMPLATES[::3]:
        took, most, _ = seconds_and_bytes(source)
        assert took < PROCESSOR_S, source[:100]
        assert most < 8 * template_sandbox.MAX_RENDERED_SIZE, source[:100]


@pytest.mark.parametrize(
    "source", ["{{ 1 }}" * 60_000, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "-" * 9000 + "1 }}", "{% if"]
)
def test_one_that_is_none_or_too_long_is_refused_before(source):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        Template(source)


def test_one_that_fails_for_a_short_text_is_not_tried_again():
    template = ChatTemplate(TOO_LONG["loops"], {})
    for _ in range(20):
        begun = time.thread_time()
        with pytest.raises(RequestError, match="takes longer than 1 s") as caught:
            template.render(MESSAGES)
        took = time.thread_time() - begun
    assert caught.value.code == "bad_request"
    assert took < template_sandbox.RENDER_LIMIT_S / 2


def test_limits_are_a_threads_own_and_a_renderings_own():
    """What one rendering made is not counted for the next, nor for one beside it."""
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


def test_an_error_that_a_template_raises_is_short():
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
def test_what_templates_do_is_done(source, text):
    assert Template(source).render({"messages": MESSAGES}) == text


def test_a_limit_is_an_error_of_ours():
    assert issubclass(TemplateLimitError, RequestError.__mro__[1])
