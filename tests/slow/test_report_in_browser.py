"""The demo's report in a real browser: it draws, in light and dark, and asks the network for nothing."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

from demo.report import Report, write
from tests.slow import tools

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def chromium() -> str:
    tools.install("chromium")
    return shutil.which("chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("report") / "report.html"
    names = ["random", "margin"]
    write(
        path,
        Report(
            title="A report",
            dataset="made up",
            version="0",
            counts=[10, 20, 30],
            accuracy={name: rng.uniform(0.5, 0.9, (3, 3)) for name in names},
            picks={name: rng.choice(50, 6, replace=False) for name in names},
            scores={name: rng.uniform(size=6) for name in names},
            images=rng.uniform(size=(50, 8, 8)),
            labels=rng.integers(0, 4, 50),
            projection=rng.normal(size=(50, 2)),
            initial=np.arange(5),
            seconds=dict.fromkeys(names, 0.01),
        ),
    )
    return path


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_it_draws_without_complaints(chromium, page, tmp_path, scheme):
    shot = tmp_path / "shot.png"
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
            "--enable-logging=stderr", "--log-level=0", "--window-size=1200,2000", f"--screenshot={shot}",
            page.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert not re.findall(r"CONSOLE.*", done.stderr)
    pixels = shot.read_bytes()
    assert pixels.startswith(b"\x89PNG")
    assert len(pixels) > 30_000, "an empty page is smaller"
