"""The command line: exit statuses, one clear line for what is wrong, and a server that starts and stops."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from queryselect import Client, cli
from queryselect_service import server, settings

COMMAND = Path(sys.executable).with_name("queryselect")


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody answers, and where nobody else can listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean() | environment,
    )


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("QUERYSELECT_")}


# Usage


@pytest.mark.parametrize(("arguments", "returned"), [([], 2), (["--help"], 0), (["-h"], 0), (["help"], 0)])
def test_usage_lists_the_commands(arguments: list[str], returned: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == returned
    out, err = capsys.readouterr()
    shown, other = (err, out) if returned else (out, err)
    assert shown.startswith("usage: queryselect COMMAND")
    assert all(f"  {name}" in shown for name in cli.COMMANDS)
    assert other == ""


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["helth"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("queryselect: there is no command 'helth'\nusage: ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: queryselect {name}")


def test_the_console_script_is_installed() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: queryselect COMMAND")


# health


@pytest.mark.parametrize("service", [None, "", "queryselect.v1.StrategyService"])
def test_health_of_a_server(target: str, service: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["health", target, *([] if service is None else ["--service", service])]
    assert cli.main(arguments) == 0
    assert capsys.readouterr() == ("SERVING\n", "")


def test_health_where_nobody_answers(nobody: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["health", nobody, "--timeout", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{nobody}: UNAVAILABLE: ")


def test_health_of_an_unknown_service(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["health", target, "--service", "nothing"]) == 2
    assert "NOT_FOUND" in capsys.readouterr().err


def test_health_of_a_server_that_is_draining(capsys: pytest.CaptureFixture[str]) -> None:
    started = server.start(settings.Settings(port=0, metrics_port=-1))
    try:
        started.health.enter_graceful_shutdown()
        assert cli.main(["health", f"127.0.0.1:{started.port}"]) == 1
        assert capsys.readouterr() == ("NOT_SERVING\n", "")
    finally:
        started.drain(0)


# serve


def test_serve_answers_until_it_is_told_to_stop() -> None:
    with subprocess.Popen(
        [COMMAND, "serve", "--port", "0", "--metrics-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean() | {"QUERYSELECT_DRAIN_GRACE": "7", "QUERYSELECT_PORT": "1"},
    ) as process:
        try:
            line = process.stdout.readline()
            told = re.fullmatch(r"queryselect serves on (127\.0\.0\.1:\d+), metrics on port (\d+)\n", line)
            assert told, line
            address, metrics = told.groups()
            with Client(address, timeout=30) as client:
                picks = client.select("k_center_greedy", 1, embeddings=[[0.0], [5.0]], labeled=[0])
                assert picks.indices.tolist() == [1]
            assert cli.main(["health", address]) == 0
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10) as page:
                assert 'code="OK"' in page.read().decode()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    assert '"drain_grace": 7.0' in err  # the settings are told at start
    assert "stopped" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "-5"], "port must be at least 0; it is -5"),
        (["--max-rows", "0"], "max_rows must be at least 1; it is 0"),
        (["--queue-wait", "nan"], "queue_wait must be at least 0; it is nan"),
        (["--tls-cert", "a.crt"], "tls_cert and tls_key need each other; only one is set"),
        (["--host", "0.0.0.0", "--token-file", "a.toml"], "tokens would travel in clear text to 0.0.0.0"),
        (["--config", "{tmp}/missing.toml"], "missing.toml"),
        (["--config", "{tmp}/name.toml"], "there is no setting prot; there are host, port"),
        (["--config", "{tmp}/type.toml"], "port must be of type int; it is 'many'"),
        (["--config", "{tmp}/broken.toml"], "line 1"),
    ],
)
def test_bad_settings_are_one_clear_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "name.toml").write_text("prot = 1")
    (tmp_path / "type.toml").write_text('port = "many"')
    (tmp_path / "broken.toml").write_text("port = = 1\n")
    assert cli.main(["serve", *(each.format(tmp=tmp_path) for each in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("queryselect serve: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_bad_environment_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUERYSELECT_MAX_QUEUE", "many")
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == "queryselect serve: max_queue must be of type int; it is 'many'\n"


@pytest.mark.parametrize("arguments", [["--port", "many"], ["--prot", "1"], ["--port"], ["extra"]])
def test_bad_flags_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", *arguments])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("queryselect serve: error: ")


def test_a_server_that_can_not_start_says_why(target: str) -> None:
    cases = [
        (["--port", target.rpartition(":")[2]], "Failed to bind to address"),
        (["--device", "toaster"], "toaster"),
        (["--device", "cuda:99"], "device cuda:99 does not work"),
        (["--log-level", "LOUD"], "log_level must be one of"),
        (["--token-file", "none.toml"], "token_file none.toml: No such file or directory"),
    ]
    # In processes of their own: a start touches signals and logging.
    with ThreadPoolExecutor(len(cases)) as threads:
        ended = list(threads.map(lambda case: run("serve", "--metrics-port", "-1", *case[0]), cases))
    for done, (_, words) in zip(ended, cases, strict=True):
        last = done.stderr.splitlines()[-1]
        assert (done.returncode, done.stdout) == (2, "")
        assert last.startswith("queryselect serve: ")
        assert words in last
        assert "Traceback" not in done.stderr


# Settings


VALUES = {"host": "0.0.0.0", "port": 1234, "queue_wait": 2.5, "max_queue": 3}


@pytest.fixture
def toml(tmp_path: Path) -> str:
    path = tmp_path / "settings.toml"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in VALUES.items()))
    return str(path)


def test_flags_environment_and_toml_mean_the_same(toml: str) -> None:
    flags = [part for name, value in VALUES.items() for part in ("--" + name.replace("_", "-"), str(value))]
    environment = {f"QUERYSELECT_{name.upper()}": str(value) for name, value in VALUES.items()}
    expected = settings.Settings(**VALUES)
    assert settings.load(flags, {}) == expected
    assert settings.load([], environment) == expected
    assert settings.load(["--config", toml], {}) == expected
    assert settings.load([], {"QUERYSELECT_CONFIG": toml}) == expected
    assert settings.load([], {"OTHER": "1"}) == settings.Settings()


@pytest.mark.parametrize(
    ("arguments", "environment", "port"),
    [
        (["--port", "1"], {"QUERYSELECT_PORT": "2"}, 1),
        ([], {"QUERYSELECT_PORT": "2"}, 2),
        (["--port", "0"], {"QUERYSELECT_PORT": "2"}, 0),
        ([], {}, 1234),
    ],
)
def test_flags_win_over_the_environment_and_that_over_toml(
    arguments: list[str], environment: dict[str, str], port: int, toml: str
) -> None:
    chosen = settings.load(["--config", toml, *arguments], environment)
    assert (chosen.port, chosen.max_queue) == (port, 3)
    other = settings.load(arguments, {"QUERYSELECT_CONFIG": toml, **environment})
    assert other == chosen
