"""docs/extending.md, "A command": a module of one's own becomes a command of `esg` without a change to the package."""

import sys

import pytest

from esg_jax import cli

# The file sizes_command.py of the documentation.
SIZES = """
import argparse
from pathlib import Path

DESCRIPTION = "Prints the size of every image."
EXAMPLES = "examples:\\n  esg sizes photos/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path)


def run(args: argparse.Namespace) -> int:
    from esg_jax.input.image_io import image_size, list_images

    for image in list_images(args.path):
        print(image.name, *image_size(image))
    return 0
"""


@pytest.fixture
def sizes_command(tmp_path, monkeypatch):
    (tmp_path / "sizes_command.py").write_text(SIZES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "sizes", ("sizes_command", "height and width of images"))
    yield
    sys.modules.pop("sizes_command", None)


def test_it_runs_and_explains_itself(sizes_command, tmp_path, pictures, capsys):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.fromarray(pictures[0][0]).save(tmp_path / "photos" / "a.png")
    assert cli.main(["sizes", str(tmp_path / "photos")]) == 0
    assert capsys.readouterr().out == "a.png 40 60\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["sizes", "--help"])
    assert stop.value.code == 0 and "esg sizes photos/" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "height and width of images" in capsys.readouterr().out


def test_its_errors_are_one_line(sizes_command, tmp_path, capsys):
    assert cli.main(["sizes", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"esg sizes: image file or folder not found: {tmp_path / 'nowhere'}\n"
