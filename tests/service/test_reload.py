"""Files that change: what is read, when it is tried again, and what the log says."""

from __future__ import annotations

import logging

import pytest

from queryselect_service import reload
from queryselect_service.reload import Reloaded


@pytest.fixture
def clock(monkeypatch):
    """Moments that the test makes."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(reload, "time", made)
    return made


def test_what_could_not_be_read_is_tried_again_though_it_has_not_changed(tmp_path, clock, caplog):
    """As where there were too many open files at the moment at which it changed."""
    caplog.set_level(logging.INFO)
    path, faults = tmp_path / "x", []
    path.write_text("one")

    def read() -> str:
        if faults:
            raise OSError(*faults)
        return path.read_text()

    file = Reloaded("x", [path], read)
    assert (file.get(), file.current) == ("one", True)
    path.write_text("another")
    faults[:] = 24, "Too many open files"
    for _ in range(3):
        assert (file.get(), file.current) == ("one", False)
        clock.now += reload.AGAIN
    faults.clear()
    assert file.get() == "another"
    assert file.current
    told = [each.message for each in caplog.records]
    assert told == ["x: the new one is not used: [Errno 24] Too many open files", "x: read anew"]


def test_it_is_not_tried_at_every_look(tmp_path, clock):
    path, tried = tmp_path / "x", []
    path.write_text("one")

    def read() -> str:
        tried.append(clock.now)
        if len(tried) > 1:
            raise ValueError("wrong")
        return path.read_text()

    file = Reloaded("x", [path], read)
    path.write_text("another")
    for _ in range(100):
        file.get()
        clock.now += reload.AGAIN / 8
    assert len(tried) == 1 + 13
    path.write_text("a third")
    file.get()
    assert len(tried) == 1 + 14, "what is new is read at once"


def test_another_fault_is_told_of_and_the_same_is_not(tmp_path, caplog):
    path = tmp_path / "x"
    path.write_text("fine")

    def read() -> str:
        if (text := path.read_text()) != "fine":
            raise ValueError(f"{text} is wrong")
        return text

    file = Reloaded("x", [path], read)
    for text in ("red", "green", "green", "fine", "green"):
        path.unlink()
        path.write_text(text)
        file.get()
    told = [each.message.rpartition(": ")[2] for each in caplog.records if each.levelno == logging.ERROR]
    assert told == ["red is wrong", "green is wrong", "green is wrong"]
