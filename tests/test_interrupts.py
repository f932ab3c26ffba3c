"""Ctrl-C reaches whoever asks for it, though a library swallowed the exception."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from grid.interrupts import Interrupt, heeded


def test_an_interrupt_is_raised_and_remembered() -> None:
    before = signal.getsignal(signal.SIGINT)
    with heeded() as interrupt:
        assert interrupt == Interrupt(seen=False)
        with contextlib.suppress(KeyboardInterrupt):  # as a library would
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt == Interrupt(seen=True)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), heeded():
        os.kill(os.getpid(), signal.SIGINT)


def test_what_ignores_interrupts_goes_on_ignoring_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heeded() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert interrupt == Interrupt(seen=False)
    finally:
        signal.signal(signal.SIGINT, before)
