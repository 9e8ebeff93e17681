"""The process that renders chat templates: what it can reach, how long it lives, who may use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from helpers.chat_templates import said
from runtime.paths import ROOT
from tokenization.template_renderer import Rendering, RenderingLimits, Request, TemplateRenderer

LIMITS = RenderingLimits(cpu_seconds=5, memory_bytes=128 << 20, max_chars=1 << 20)
MESSAGES = said(("u", "Amakuru?"), ("a", "Ni meza."))
ECHO = "{{ messages[0].content }}{{ n }}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
WAIT_SECONDS = 20  # until a process must have ended; mostly a few milliseconds pass
# A program that starts a renderer, prints its process id, and lets it render a template.
PARENT = """
import sys
from tokenization.template_renderer import RenderingLimits, Request, TemplateRenderer
renderer = TemplateRenderer(RenderingLimits(cpu_seconds=100))
renderer.render("x", {}, Request([]))
print(renderer.process.popen.pid, flush=True)
renderer.render(sys.argv[1], {}, Request([]))
sys.stdin.read()
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def renderer():
    renderer = TemplateRenderer(LIMITS)
    yield renderer
    renderer.close()


def has_ended(pid: int) -> bool:
    """Whether a process has ended, and has been reaped, within WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def process_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: man 5 proc_pid_stat."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_ticks(pid: int) -> int:
    """The CPU time of a process in user mode and in the kernel."""
    return sum(map(int, process_fields(pid)[11:13]))


def has_ended_as_an_orphan(pid: int) -> bool:
    """Whether a process has ended within WAIT_SECONDS; its new parent may not have reaped it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            if process_fields(pid)[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def render(renderer: TemplateRenderer, source: str, **variables: object) -> Rendering:
    return renderer.render(source, variables, Request(MESSAGES))


def echo(renderer: TemplateRenderer, n: int) -> None:
    assert render(renderer, ECHO, n=n).text == f"Amakuru?{n}"


@linux
def test_it_has_no_files_no_packages_but_jinja2_and_its_limits(renderer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    echo(renderer, 1)
    home = Path(f"/proc/{renderer.process.popen.pid}")
    assert sorted(os.listdir(home / "fd")) == ["0", "1", "2"]
    limits = {line[:26].strip(): line[26:].split()[:2]
              for line in (home / "limits").read_text().splitlines()}
    assert limits["Max address space"] == [str(LIMITS.memory_bytes)] * 2
    assert limits["Max open files"] == ["3", "3"] and limits["Max file size"] == ["0", "0"]
    assert "secret" not in (home / "environ").read_text()
    mapped = (home / "maps").read_text()
    assert "markupsafe" in mapped and "torch" not in mapped and "numpy" not in mapped


@linux
@pytest.mark.parametrize("template", ["x", ENDLESS], ids=["idle", "busy"])
def test_it_ends_when_its_parent_is_killed(template):
    with subprocess.Popen([sys.executable, "-c", PARENT, template], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        begin = cpu_ticks(pid)
        while template == ENDLESS and cpu_ticks(pid) < begin + 10:
            time.sleep(0.01)
        parent.kill()
        assert has_ended_as_an_orphan(pid)


@linux
def test_it_ends_with_its_parent():
    done = subprocess.run([sys.executable, "-W", "error", "-c", PARENT, "x"], cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0 and done.stderr == ""
    assert has_ended_as_an_orphan(int(done.stdout))


def test_no_zombie_is_left(renderer):
    echo(renderer, 1)
    pid = renderer.process.popen.pid
    assert "memory" in render(renderer, "{{ 'a' | center(10 ** 12) }}").error
    assert has_ended(pid)
    echo(renderer, 2)
    pid = renderer.process.popen.pid
    renderer.close()
    assert has_ended(pid)


def test_after_it_was_killed_another_one_renders(renderer):
    echo(renderer, 1)
    pid = renderer.process.popen.pid
    os.kill(pid, signal.SIGKILL)
    assert has_ended(pid)
    renderer.process.thread.join()
    echo(renderer, 2)


def test_signals_for_the_whole_group_do_not_end_it(renderer):
    echo(renderer, 1)
    pid = renderer.process.popen.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    echo(renderer, 2)
    assert renderer.process.popen.pid == pid


def test_a_killed_rendering_says_so(renderer):
    echo(renderer, 1)
    pid = renderer.process.popen.pid
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    assert "was killed" in render(renderer, ENDLESS).error
    timer.join()
    echo(renderer, 2)


def test_waiting_is_not_computing():
    renderer = TemplateRenderer(RenderingLimits(cpu_seconds=0.3))
    echo(renderer, 1)
    pid = renderer.process.popen.pid
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(1.0, os.kill, (pid, signal.SIGCONT))
    timer.start()
    begin = time.monotonic()
    echo(renderer, 2)
    assert time.monotonic() - begin > 0.6 and renderer.process.popen.pid == pid
    timer.join()
    renderer.close()


@linux
def test_every_conversation_has_the_whole_cpu_time():
    renderer = TemplateRenderer(RenderingLimits(cpu_seconds=0.2))
    echo(renderer, 1)
    pid, ticks = renderer.process.popen.pid, 0
    while ticks < os.sysconf("SC_CLK_TCK") / 2:  # half a second in all
        assert render(renderer, "{% for i in range(99999) %}{% endfor %}").error == ""
        ticks = cpu_ticks(pid)
    assert renderer.process.popen.pid == pid
    renderer.close()


def test_an_interrupted_rendering_leaves_no_answer_for_the_next(renderer):
    echo(renderer, 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            render(renderer, ENDLESS)
    finally:
        signal.signal(signal.SIGALRM, handler)
    echo(renderer, 2)


def test_a_fork_has_a_process_of_its_own(renderer):
    echo(renderer, 1)
    pid = os.fork()
    if pid == 0:  # nothing of the tests may run twice
        status = 1
        try:
            for n in range(50):
                echo(renderer, n)
            renderer.close()
            status = 0
        finally:
            os._exit(status)
    for n in range(50):
        echo(renderer, 100 + n)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_threads_share_it_also_after_the_one_that_started_it(renderer):
    starter = threading.Thread(target=echo, args=(renderer, 0))
    starter.start()
    starter.join()
    pid = renderer.process.popen.pid
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: echo(renderer, n), range(200)))
    assert renderer.process.popen.pid == pid


def test_every_filter_test_and_function_of_jinja2_works_without_files(renderer):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    calls = [f"{{{{ {value} | {name}{arguments} }}}}" for name in sorted(environment.filters)
             for value in ("'a b <i>http://a.bc</i> é'", "[3, 1, 2]", "{'a': 1}")
             for arguments in ("", "(2)", "('a')")
             if name not in ("tojson", "random")]
    calls += [f"{{{{ 1 is {name} }}}}{{{{ 'a' is {name}('a') }}}}" for name in environment.tests]
    calls += ["{{ lipsum(1, false, 5, 6) | length > 9 }}", "{{ '\\N{DASH} \\u00e9' }}",
              "{{ joiner(', ')() }}{{ cycler(1, 2).next() }}{{ dict(a=1) }}",
              "{{ 'é'.encode('utf-16') }}{{ 'é'.encode('latin-1') }}{{ 'a'.encode('idna') }}"]
    for call in calls:
        try:
            expected = environment.from_string(call).render(messages=MESSAGES)
        except Exception as e:
            error = render(renderer, call).error
            expected = str(e) if isinstance(e, jinja2.TemplateError) else type(e).__name__
            assert " ".join(expected.split())[:100] in error, call
            continue
        if " at 0x" not in expected:  # a generator
            assert render(renderer, call).text == expected, call


def test_dates_are_those_of_this_process(renderer, monkeypatch):
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # 14 hours before Greenwich
    time.tzset()
    try:
        before = time.strftime("%d %B %Y %H %Z")
        text = render(renderer, "{{ strftime_now('%d %B %Y %H') }}").text
        assert text in (before.rpartition(" ")[0], time.strftime("%d %B %Y %H"))
    finally:
        monkeypatch.undo()
        time.tzset()
