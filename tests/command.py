"""The command line inside the tests' own process."""

import json

from click.testing import CliRunner

from convmixer.cli import main

RUNNER = CliRunner()


def run(*arguments, status=0):
    """Run a command; an exception that a user would see as a traceback fails the test."""
    result = RUNNER.invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def records(*arguments, **options):
    """Run a command, and return the JSON that it prints."""
    return json.loads(run(*arguments, **options).stdout)
