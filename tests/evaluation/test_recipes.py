"""Every recipe's command parses, names a known configuration, and quotes metrics that its result has."""

import shlex

import pytest

from configs.recipes import reconstruction, sets, tables
from esg_jax import cli
from esg_jax.evaluation.metrics import averages
from esg_jax.evaluation.tasks import task_from_dict

ESG_TABLES = (1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
GLEE_TABLES = (4, 5, 6, 7, 8, 9)


def test_every_table_has_a_recipe():
    numbers = {(r.table.split()[0], int(r.table.split()[1].rstrip("ab"))) for r in tables.RECIPES.values()}
    assert numbers == {("ESG", t) for t in ESG_TABLES} | {("GLEE", t) for t in GLEE_TABLES}


@pytest.mark.parametrize("name", tables.RECIPES)
def test_commands_are_valid(name):
    parser = cli.make_parser("evaluate")
    for command in tables.RECIPES[name].command.split(" && "):
        words = shlex.split(command)
        if words[0] == "esg":
            parser.parse_args(words[1:])
            continue
        assert words[:2] == ["python", "eval.py"]
        flags = dict(word.lstrip("-").split("=", 1) for word in words[2:])
        config = {name.split(".")[1]: value for name, value in flags.items() if name.startswith("config.")}
        assert set(flags) <= {"config", "checkpoint", "out", "views"} | {f"config.{name}" for name in config}
        file, set_name = flags["config"].split(":")
        assert file == "configs/recipes/sets.py"
        task_from_dict({**sets.get_config(set_name).to_dict(), **config})
    assert tables.show(name).startswith(name)


def test_unknown_names_are_refused(capsys):
    assert tables.main(["nonsense"]) == 1
    assert "esg_t4_ent" in capsys.readouterr().err
    with pytest.raises(ValueError, match="choose one of entityseg_low"):
        sets.get_config("nonsense")


def test_data_of_the_reconstruction():
    made = {
        name: task_from_dict(reconstruction.get_config(f"{name},some,folder").to_dict())
        for name in ("scenes", "entity_mini")
    }
    assert made["scenes"].annotations == "some,folder/annotations.json"
    assert made["entity_mini"].annotations == "some,folder/entity_mini/entity_val.json"
    assert made["entity_mini"].group_by == "source" and not made["scenes"].group_by
    for wrong in ("../shared/realdata", "scenes"):
        with pytest.raises(ValueError, match="takes DATA,FOLDER with DATA scenes or entity_mini"):
            reconstruction.get_config(wrong)


def test_sets_of_averages_have_the_published_sizes():
    assert {name: len(members) for name, members in averages.SETS.items()} == {
        "odinw13": 13,
        "sginw": 25,
        "in-the-wild": 4,
    }
