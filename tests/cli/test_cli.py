import subprocess
import sys

import pytest

from esg_jax import __version__, cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: esg {command}" in capsys.readouterr().out


def test_predict_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and "--threshold" in text


def test_lists_all_commands_without_importing_them(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    heavy = "import sys, esg_jax.cli as cli; cli.make_parser(''); print({'jax', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice"),
        (["predict"], "IMAGE_OR_FOLDER"),
        (["predict", "a.png"], "--out"),
        (["predict", "a.png", "--out", "o", "--formats", "gif"], "unknown format gif"),
        (["predict", "a.png", "--out", "o", "--buckets", "big"], "expected sizes"),
        (["predict", "a.png", "--out", "o", "--views", "2"], "invalid choice"),
        (["predict", "a.png", "--out", "o", "--batch-size", "0"], "not positive"),
    ],
)
def test_wrong_use_is_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
