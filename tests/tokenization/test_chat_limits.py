"""Chat templates that compute, store, nest or write too much: each ends within its limits, as one
line that names the file. The plain tests use small limits, the slow ones the limits of the program.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.chat_templates import (
    KINDS,
    QWEN,
    TEMPLATES,
    byte_level,
    said,
    tokenizer_folders,
)
from runtime.console import UserError
from tokenization.chat_template import ChatTemplate, Loss
from tokenization.template_renderer import (
    RenderingLimits,
    Request,
    TemplateRenderer,
    shared_renderer,
)
from tokenization.tokenizer import Tokenizer

SMALL = RenderingLimits(cpu_seconds=0.05, memory_bytes=96 << 20, max_chars=1 << 18)
MESSAGES = said(("u", "Amakuru?"), ("a", "Ni meza."))
TIME, MEMORY, OUTPUT = "CPU time", "MB of memory", "without end"
START_SECONDS = 1.5  # of CPU time, at most, in which a process starts
BIG = "{% set ns = namespace(x='x' * 1000000) %}"  # a text of 1 MB
TWICE = "{% for i in range(99) %}"
LOOP = "{% for i in range(99999) %}"

# Template -> what the refusal says (alternatives by |); "": rendered within the limits.
TEXTS = {
    "doubled by ~": (TWICE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", MEMORY),
    "doubled by +": (TWICE + "{% set ns.x = ns.x + ns.x %}{% endfor %}", MEMORY),
    "doubled by *": (TWICE + "{% set ns.x = ns.x * 2 %}{% endfor %}", f"too much|{MEMORY}"),
    "doubled by join": (TWICE + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}", MEMORY),
    "doubled by format": (TWICE + "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}{% endfor %}",
                          MEMORY),
    "doubled by a method": (TWICE + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}", MEMORY),
    "doubled by %": (TWICE + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}", MEMORY),
    "doubled by replace": (TWICE + "{% set ns.x = ns.x | replace('x', 'xx') %}{% endfor %}",
                           f"{MEMORY}|{TIME}"),
    "doubled by a block": (TWICE + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
                           "{% set ns.x = y %}{% endfor %}", f"{MEMORY}|{TIME}"),
    "doubled by a method replace": (
        TWICE + "{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}", f"{MEMORY}|{TIME}"),
    "doubled by a list": ("{% set ns = namespace(x=[1]) %}" + TWICE
                          + "{% set ns.x = ns.x + ns.x %}{% endfor %}", MEMORY),
    "doubled by tojson": (TWICE + "{% set ns.x = (ns.x ~ '\\\\') | tojson %}{% endfor %}",
                          f"{MEMORY}|{TIME}"),
    "escaped again and again": (TWICE + "{% set ns.x = ('&' ~ ns.x) | forceescape | string "
                                "| replace('x', '&') %}{% endfor %}", f"{MEMORY}|{TIME}"),
    "urls": (LOOP + "{% set ns.x = (ns.x ~ ' http://a.bc') | urlize %}{% endfor %}",
             f"{MEMORY}|{TIME}"),
    "a width of %": ("{{ '%2000000000d' % 1 }}", MEMORY),
    "a precision of %": ("{{ '%.2000000000f' % 1 }}", f"{MEMORY}|Error"),
    "a width of format": ("{{ '{:>2000000000}'.format(1) }}", MEMORY),
    "a width in a width": ("{{ '{:>{}}'.format(1, 2000000000) }}", MEMORY),
    "the format filter": ("{{ '%2000000000s' | format(1) }}", MEMORY),
    "center": ("{{ 'a' | center(2000000000) }}", MEMORY),
    "a method center": ("{{ 'a'.center(2000000000) }}", MEMORY),
    "ljust": ("{{ 'a'.ljust(2000000000) }}", MEMORY),
    "rjust": ("{{ 'a'.rjust(2000000000, 'é') }}", MEMORY),
    "zfill": ("{{ 'a'.zfill(2000000000) }}", MEMORY),
    "expandtabs": ("{{ '\t'.expandtabs(2000000000) }}", MEMORY),
    "indent": ("{{ ('\na' * 1000) | indent(1000000) }}", f"{MEMORY}|too much"),
    "indent by a text": ("{{ ('\na' * 1000) | indent('x' * 1000000) }}", MEMORY),
    "tojson's indent": ("{{ [[[[1]]]] | tojson(indent=900000000) }}", MEMORY),
    "tojson's indent of a text": ("{{ [[1] * 1000] | tojson(indent='x' * 1000000) }}", MEMORY),
    "tojson's separators": ("{{ ([1] * 1000) | tojson(separators=('x' * 1000000, ':')) }}", MEMORY),
    "lipsum": ("{{ lipsum(n=1000000) }}", f"{TIME}|{OUTPUT}|{MEMORY}"),
    "words of lipsum": ("{{ lipsum(n=1, min=100000000, max=100000001) }}",
                        f"{TIME}|{MEMORY}|{OUTPUT}"),
    "join with a long text": ("{{ range(1000) | join('x' * 1000000) }}", MEMORY),
    "a method join": ("{{ ('x' * 1000000).join(['a'] * 1000) }}", MEMORY),
    "wordwrap": ("{{ ('a ' * 1000000) | wordwrap(1, wrapstring='x' * 10000) }}",
                 f"{TIME}|{MEMORY}"),
    "a translation table": ("{{ ('a' * 1000).translate({97: 'x' * 1000000}) }}", MEMORY),
    "a product": ("{{ 'x' * 2 ** 40 }}", "too much"),
    "a product of lists": ("{{ ([[1] * 1000] * 1000 * 100000) | length }}", "too much"),
    "a product in a set block": ("{% set x %}{{ 'x' * 60000000 }}{% endset %}{{ x }}{{ x }}",
                                 f"{MEMORY}|{OUTPUT}"),
}
LOOPS = {
    "nested loops": (LOOP + LOOP + "{% endfor %}{% endfor %}", TIME),
    "loops that write": (LOOP + LOOP + "x{% endfor %}{% endfor %}", f"{TIME}|{OUTPUT}"),
    "a long range": ("{% for i in range(10 ** 12) %}{% endfor %}", "range|too much"),
    "a range as a list": ("{{ range(99999) | list | length }}", ""),
    "ranges of ranges": ("{% set ns = namespace(x=[]) %}" + LOOP
                         + "{% set ns.x = ns.x + [range(99999) | list] %}{% endfor %}",
                         f"{MEMORY}|{TIME}"),
    "a namespace that grows": ("{% set ns = namespace(x=[]) %}" + LOOP
                               + "{% set ns.x = [ns.x, ns.x, i] %}{% endfor %}{{ ns.x }}",
                               f"{MEMORY}|{TIME}|Recursion"),
    "a recursive macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}", TIME),
    "macros that call each other": (
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "Recursion|undefined"),
    "a recursive loop": ("{% for x in [[]] recursive %}{{ loop([x]) }}{% endfor %}", "Recursion"),
    "a recursive loop that doubles": (
        "{% for x in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}", TIME),
    "caller": ("{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
               + "{% call f() %}" * 40 + "x" + "{% endcall %}" * 40, f"{TIME}|nested|{OUTPUT}"),
    "slice": ("{{ range(99999) | slice(99999) | list | length }}{{ ([1] * 60000) | slice(9999999) "
              "| list | length }}", f"{TIME}|{MEMORY}"),
    "batch": ("{{ [1] | batch(2000000000, 'x') | list | length }}", f"{TIME}|{MEMORY}"),
    "groupby": (BIG + LOOP + "{{ range(99999) | map('string') | groupby('0') | list | length }}"
                "{% endfor %}", TIME),
    "sum of lists": ("{{ ([[1] * 1000] * 60000) | sum(start=[]) | length }}", f"{TIME}|{MEMORY}"),
    "sort": (LOOP + "{% set x = range(99999) | sort(reverse=true) %}{% endfor %}", TIME),
    "unique": (LOOP + "{% set x = range(99999) | unique | list %}{% endfor %}", TIME),
    "a generator without end": (
        "{% set c = cycler('a', 'b') %}" + LOOP + LOOP + "{{ c.next() }}{% endfor %}{% endfor %}",
        f"{TIME}|{OUTPUT}"),
    "a map over a map": ("{% set ns = namespace(x=range(99999)) %}" + LOOP
                         + "{% set ns.x = ns.x | map('abs') %}{% endfor %}{{ ns.x | list }}",
                         f"{TIME}|{MEMORY}|Recursion|crashes"),
    "a large power": ("{{ 10 ** 100000 }}", "too much"),
    "a power of powers": ("{% set ns = namespace(x=9) %}" + TWICE + "{% set ns.x = ns.x ** 60 %}"
                          "{% endfor %}", "too much"),
    "striptags": ("{{ ('<' * 60000000) | striptags }}", f"{TIME}|{MEMORY}|{OUTPUT}"),
    "title of a long text": ("{{ ('a b' * 20000000) | title | length }}", f"{TIME}|{MEMORY}"),
    "find in a text": ("{{ ('a' * 1000000).find('a' * 500000 ~ 'b') }}" * 50, f"|{TIME}"),
}
SOURCES = {
    "parentheses": ("{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}", "Recursion"),
    "lists": ("{{ " + "[" * 50000 + "1" + "]" * 50000 + " }}", "Recursion"),
    "a few lists": ("{{ " + "[" * 150 + "1" + "]" * 150 + " }}", "Error|"),
    "signs": ("{{ " + "-" * 50000 + "1 }}", "Recursion"),
    "not": ("{{ " + "not " * 50000 + "1 }}", "Recursion"),
    "attributes": ("{{ x" + ".x" * 50000 + " }}", f"Recursion|undefined|{TIME}"),
    "filters": ("{{ 'x'" + " | trim" * 50000 + " }}", f"Recursion|{TIME}"),
    "sums": ("{{ 1" + " + 1" * 50000 + " }}", f"Recursion|{TIME}"),
    "conditions": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, f"Recursion|nested|Error|{TIME}"),
    "a hundred loops": ("{% for i in [1, 2] %}" * 100 + "x" + "{% endfor %}" * 100,
                        "Error|nested|blocks"),
    "blocks": ("".join("{% block b" + str(i) + " %}" for i in range(2000))
               + "{% endblock %}" * 2000, f"Recursion|nested|{TIME}"),
    "elif": ("{% if 0 %}" + "{% elif 0 %}" * 20000 + "{% endif %}", f"Recursion|{TIME}|{MEMORY}"),
    "many literals": ("{{ [" + "1," * 300000 + "] }}", f"{TIME}|{OUTPUT}|{MEMORY}|"),
    "many names": ("".join("{% set a" + str(i) + " = 1 %}" for i in range(20000)),
                   f"{TIME}|{MEMORY}|Recursion|"),
    "a folded sum": ("{{ ('x' ~ 'y') | center(1000000000) }}", MEMORY),
    "a folded product": ("{{ 2 ** 10 ** 9 }}", "too much"),
    "a folded text": ("{{ '%1000000000d' % 1 }}{{ ('x' | center(1000000000)) ~ 'x' }}", MEMORY),
    "digits": ("{{ " + "9" * 100000 + " }}", "Error|digits"),
    "broken": ("{% for x in", "unexpected|Expected"),
    "an unknown tag": ("{% system %}", "unknown tag"),
    "an unknown filter": ("{{ 1 | open }}", "No filter"),
    "import": ("{% import 'os' as os %}{{ os }}", "no loader"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "from": ("{% from 'x' import y %}", "no loader"),
    "extends": ("{% extends '/etc/passwd' %}", "no loader"),
}
ATTACKS = {
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "classes by a filter": ("{{ ('' | attr('__class__')) ~ ('' | attr('__class__')).x }}",
                            "unsafe|undefined"),
    "classes by map": ("{{ [''] | map(attribute='__class__') | list | string }}{{ 1 / 0 }}",
                       "unsafe|ZeroDivision"),
    "globals of a function": ("{{ raise_exception.__globals__.json }}", "unsafe"),
    "globals of lipsum": ("{{ lipsum.__globals__['os'].popen('id').read() }}", "unsafe"),
    "globals of cycler": ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
    "the own object of strftime_now": ("{{ strftime_now.__self__.template }}", "unsafe"),
    "the frame of a generator": ("{{ (messages | map('length')).gi_frame.f_globals }}", "unsafe"),
    "self": ("{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
             "unsafe|undefined"),
    "format of attributes": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
                             "unsafe"),
    "format_map": ("{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}", "unsafe"),
    "a list that changes": ("{{ messages.append(1) }}", "unsafe"),
    "a message that changes": ("{{ messages[0].update({'role': 'x'}) }}", "unsafe"),
    "a message that is set": ("{% set messages[0].content = 1 %}", "Expected|expected|end of"),
    "print": ("{{ print('x') }}", "undefined"),
    "stdout": ("{{ sys.stdout.close() }}{{ open('/dev/stdout') }}", "undefined"),
    "an undefined call": ("{{ nobody(1)(2) }}", "undefined"),
    "an undefined attribute": ("{{ nobody.x.y }}", "undefined"),
    "an unknown encoding": ("{{ 'x'.encode('rot13') }}{{ 'x'.encode('nonsense') }}", "Error"),
    "a long error": ("{{ raise_exception('x' * 50000000) }}", f"xxx|{MEMORY}"),
    "an error of many lines": ("{{ raise_exception('a\n' * 1000) }}", "a a a"),
    "an error that is no text": ("{{ raise_exception(messages) }}", "role|Amakuru"),
    "a long unknown key": ("{{ messages['x' * 10000000].x }}", f"undefined|no attribute|{MEMORY}"),
    "half a character": ("{{ '\\ud800' }}", "half a character"),
    "half a character behind many": ("{{ 'x' * 1000 ~ '\\udfff' }}", "half a character"),
}
CASES = {f"{group}: {name}": case for group, cases in (
    ("texts", TEXTS), ("loops", LOOPS), ("sources", SOURCES), ("attacks", ATTACKS))
    for name, case in cases.items()}
# A namespace that a template uses and does not make holds a long text.
CASES = {name: ((BIG if "ns." in source and "namespace(" not in source else "") + source, refusal)
         for name, (source, refusal) in CASES.items()}
REPEATED = [  # nearly the same as others: the slow test alone holds them
    "texts: doubled by +", "texts: doubled by a method", "texts: doubled by %",
    "texts: doubled by a method replace", "texts: a width in a width", "texts: the format filter",
    "texts: a method center", "texts: rjust", "texts: indent by a text",
    "texts: tojson's indent of a text", "texts: lipsum", "texts: a method join",
    "loops: loops that write", "loops: a macro that calls itself twice",
    "loops: macros that call each other", "loops: unique", "loops: a map over a map",
    "loops: find in a text", "sources: filters", "sources: many literals", "sources: a folded sum"]


@pytest.fixture(scope="module")
def renderers():
    """Processes with small limits: for templates that compute for ever, and for the others."""
    patient = replace(SMALL, cpu_seconds=5)
    renderers = {True: TemplateRenderer(SMALL), False: TemplateRenderer(patient)}
    yield renderers
    for renderer in renderers.values():
        renderer.close()


@pytest.fixture
def renderer(renderers):
    return renderers[False]


def check_contained(renderer: TemplateRenderer, name: str) -> None:
    """Render a hostile template: its refusal is the expected one, and on one line; and the process
    used no more CPU time than it may."""
    source, refusals = CASES[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    rendering = renderer.render(source, {"eos_token": "</s>"}, Request(MESSAGES, prompts=[1]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < renderer.limits.cpu_seconds + START_SECONDS
    assert len(rendering.text) <= renderer.limits.max_chars and len(rendering.error) < 300
    assert rendering.error.isprintable()
    if rendering.error:
        assert any(word and word in rendering.error for word in refusals.split("|"))
    else:
        assert "" in refusals.split("|")


@pytest.mark.parametrize("name", [name for name in CASES if name not in REPEATED])
def test_a_hostile_template_is_contained(renderers, name):
    check_contained(renderers[TIME in CASES[name][1]], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_template_is_contained_by_the_programs_own_limits(name):
    check_contained(shared_renderer(RenderingLimits()), name)


@pytest.fixture
def eight_busy_processes():
    """On two cores a rendering then waits for most of its time."""
    program = "while True: sum(range(100000))"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(8)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_honest_conversations_are_never_refused_beside_eight_busy_processes(
        tmp_path, eight_busy_processes):
    words = " ".join(["Amakuru y'umugezi?"] * 20)  # 380 characters
    long = said(*[("ua"[i % 2], f"{words} {i}") for i in range(800)])
    rows = [said(*[("ua"[i % 2], f"{words} {n} {i}") for i in range(10)]) for n in range(10000)]
    kinds = {"llama3": "llama3 json", "qwen": "qwen json", "gemma3": "gemma json",
             "smollm3": "smollm json", "llama2": "llama json"}
    for name, folder in tokenizer_folders(tmp_path).items():
        for template_name in (x for x, kind in kinds.items() if kind == name):
            template = open_template(folder, TEMPLATES[template_name], RenderingLimits())
            document = template.render_with_mask(long)
            assert sum(x is Loss.ALL for x in document.losses) == 400
            if template_name not in ("llama3", "smollm3"):
                continue
            n_documents = 0
            for document in template.render_all_with_mask(rows):
                assert sum(x is Loss.ALL for x in document.losses) == 5
                n_documents += 1
            assert n_documents == 10000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer's folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(byte_level(QWEN, None))
    (folder / "tokenizer_config.json").write_text(json.dumps(KINDS["qwen json"]))
    return folder


def open_template(folder: Path, source: str, limits: RenderingLimits = SMALL) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(source)
    return replace(ChatTemplate.from_folder(folder, Tokenizer.open(folder)), limits=limits)


@pytest.mark.parametrize("name, words", [
    ("loops: nested loops", "needs more than 0.05 s of CPU time for one conversation"),
    ("texts: center", "needs more than 96 MB of memory"),
    ("texts: a product in a set block", "writes without end (more than 262,144 characters)"),
    ("attacks: half a character", "writes half a character")])
def test_a_limit_is_one_line_with_the_templates_file_and_the_next_rendering_works(
        folder, name, words):
    limits = replace(SMALL, cpu_seconds=0.05 if "nested" in name else 5)
    template = open_template(folder, CASES[name][0], limits)
    calls = (template.render, template.encode, template.render_with_mask)
    for call in calls:
        with pytest.raises(UserError) as error:
            call(MESSAGES)
        assert str(error.value).startswith(f"{folder / 'chat_template.jinja'}: ")
        assert words in str(error.value) and error.value.code == 3
    honest = open_template(folder, "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert honest.render(MESSAGES) == "Amakuru?Ni meza."


def test_a_template_of_100_mb_is_refused_before_it_is_read(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with open(tmp_path / "chat_template.jinja", "wb") as file:
        file.truncate(100 << 20)
    tokenizer = Tokenizer.open(tmp_path)
    with pytest.raises(UserError, match=r"chat_template\.jinja: .* at most 1 MB"):
        ChatTemplate.from_folder(tmp_path, tokenizer)
    (tmp_path / "chat_template.jinja").unlink()
    config = {**KINDS["qwen json"], "chat_template": "x" * ((1 << 20) + 1)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: .* 1 MB"):
        ChatTemplate.from_folder(tmp_path, tokenizer)


WORK = ("{% for m in messages %}{{ m.content }}{% for i in range(m.n) %}{% for j in range(900) %}"
        "{% endfor %}{% endfor %}{% endfor %}")


def test_a_batch_is_refused_for_one_conversation_and_not_for_their_sum():
    renderer = TemplateRenderer(replace(SMALL, cpu_seconds=0.25))
    requests = [Request([{"content": str(i), "n": 300}]) for i in range(60)]  # about 8 ms each
    batch = renderer.render_all(WORK, {}, requests)
    assert [x.text for x in batch] == [str(i) for i in range(60)]
    requests[7] = Request([{"content": "7", "n": 99999}])
    batch = renderer.render_all(WORK, {}, requests)
    assert [x.text for x in batch] == [*map(str, range(7)), ""]
    assert TIME in batch[7].error and not any(x.error for x in batch[:7])
    requests[7] = Request([{"content": "x" * 200000, "n": 0}] * 4)
    batch = renderer.render_all(WORK, {}, requests)
    assert "without end" in batch[7].error and len(batch) == 8
    long = [Request([{"content": "x" * 200000, "n": 0}])] * 5  # more than one answer may hold
    assert [len(x.text) for x in renderer.render_all(WORK, {}, long)] == [200000] * 5
    renderer.close()


def test_an_error_is_that_of_the_first_conversation_that_has_one(folder):
    template = open_template(folder, TEMPLATES["qwen"])
    good, empty = MESSAGES, said(("u", "Amakuru?"), ("a", " "))
    for bad, words in ((empty, "is empty"), (good[:1], "does not end"),
                       ([{"role": "king", "content": ""}, *good], "message 1")):
        documents = template.render_all_with_mask([good, good, bad, empty])
        first = [next(documents), next(documents)]
        assert first == [template.render_with_mask(good)] * 2
        with pytest.raises(UserError, match=words):
            next(documents)
