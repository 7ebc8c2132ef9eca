"""Tests of what all commands share."""

import pytest

from cli.shared import fail


def test_an_error_message_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail("bad \x1b[2Jname\udcff.jpg:\n- é is fine").exit_code == 2
    assert capsys.readouterr().err == "error: bad \\x1b[2Jname\\xff.jpg:\n- é is fine\n"
