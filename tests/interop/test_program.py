"""Exported programs and the command line."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import esg_jax
from esg_jax import cli
from esg_jax.config import to_dict
from esg_jax.interop.convert import load_into
from esg_jax.interop.program import check_program, export_program
from esg_jax.models.backbones.swin import SwinConfig
from esg_jax.models.cropformer import CropFormer, CropFormerConfig
from esg_jax.models.cropformer.mask_decoder import MaskDecoderConfig
from esg_jax.models.cropformer.pixel_decoder import PixelDecoderConfig
from esg_jax.models.cropformer.view_association import AssociationConfig
from esg_jax.weights import named_arrays, save_weights

CONFIG = CropFormerConfig(
    backbone=SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 4), window_size=4),
    pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, num_layers=1, num_heads=8, ffn_dim=16),
    mask_decoder=MaskDecoderConfig(
        hidden_dim=32, mask_dim=32, num_heads=8, ffn_dim=16, num_layers=1, num_queries=5, num_classes=1
    ),
    association=AssociationConfig(ffn_dim=16),
)


@pytest.fixture(scope="module")
def model():
    model = nnx.eval_shape(lambda: CropFormer(CONFIG, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return load_into(
        model, {name: 0.2 * rng.normal(size=x.shape).astype(np.float32) for name, x in named_arrays(model).items()}
    )


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, model, {"steps": 3})
    return path


@pytest.fixture(scope="module")
def program(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    assert cli.main(["export", str(weights), str(folder), "--height", "64", "--width", "96", "--views", "2"]) == 0
    return folder


def test_program_gives_its_golden_outputs(program, capsys):
    assert cli.main(["export", "--check", str(program)]) == 0
    assert "mask_logits: max abs difference" in capsys.readouterr().out
    description = json.loads((program / "program.json").read_text())
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert description["inputs"]["image"] == [[1, 2, 64, 96, 3], "uint8"]
    assert description["outputs"] == {
        "class_logits": [[1, 5, 2], "float32"],
        "mask_logits": [[1, 5, 2, 16, 24], "float32"],
    }
    assert not list(program.glob("*.partial"))


def test_golden_outputs_are_those_of_the_model(program, model):
    golden = np.load(program / "golden.npz")
    output = nnx.jit(lambda model, image, size: model(image, size))(model, golden["image"], golden["size"])
    np.testing.assert_allclose(golden["class_logits"], output.batch.logits[-1], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(golden["mask_logits"], output.batch_mask_logits(), atol=1e-4, rtol=1e-4)


def test_loader_of_the_documentation_needs_only_jax(program):
    """The code block of the documentation runs with our package out of reach."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "conversion.md").read_text()
    block = text.split("<!-- loader -->")[1].split("```python\n")[1].split("```")[0]
    assert len(block.strip().splitlines()) <= 20
    code = "import sys\nsys.modules['esg_jax'] = None\n" + block.replace("program/", f"{program}/")
    code += textwrap.dedent(
        f"""
        golden = np.load("{program}/golden.npz")
        outputs = run(golden["image"], golden["size"])
        for name in ("class_logits", "mask_logits"):
            assert np.abs(np.asarray(outputs[name]) - golden[name]).max() < 1e-4, name
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=program)


def test_check_notices_other_weights(program, tmp_path, capsys):
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(program, folder)
    arrays = load_file(folder / "weights.safetensors")
    arrays["mask_decoder.class_head.bias"] += 1
    save_file(arrays, folder / "weights.safetensors")
    assert cli.main(["export", "--check", str(folder)]) == 1
    assert "above the tolerance" in capsys.readouterr().err
    (folder / "program.zip").write_bytes(b"not a program")
    assert cli.main(["export", "--check", str(folder)]) == 1
    assert "corrupt" in capsys.readouterr().err
    (folder / "golden.npz").unlink()
    assert cli.main(["export", "--check", str(folder)]) == 1
    assert "golden.npz is missing" in capsys.readouterr().err


def test_program_for_other_platforms_only(model, tmp_path):
    export_program(tmp_path, model, height=32, width=32, views=1, platforms=("tpu",))
    with pytest.raises(ValueError, match="exported for tpu, this machine is cpu"):
        check_program(tmp_path)


def test_wrong_export_options(model, tmp_path):
    with pytest.raises(ValueError, match="33x64.*multiples of 32"):
        export_program(tmp_path / "out", model, height=33, width=64)
    with pytest.raises(ValueError, match="unknown platform 'rocm'"):
        export_program(tmp_path / "out", model, height=32, width=64, platforms=("rocm",))
    assert not (tmp_path / "out").exists()


def run(*args):
    return cli.main([str(arg) for arg in args])


def test_convert_there_and_back(weights, model, tmp_path, capsys):
    """Ours to the reference's names and back; then `esg_jax.load` on each file, whatever it is called."""
    assert run("convert", weights, tmp_path / "model.pth") == 0
    assert run("convert", tmp_path / "model.pth", tmp_path / "again.safetensors") == 0
    assert "tensors converted" in capsys.readouterr().out
    renamed = tmp_path / "model.weights"
    (tmp_path / "model.pth").rename(renamed)
    for path in (weights, renamed, tmp_path / "again.safetensors"):
        loaded = esg_jax.load(path)
        assert loaded.config == CONFIG
        for name, value in named_arrays(model).items():
            np.testing.assert_array_equal(value, named_arrays(loaded)[name], err_msg=name)


def test_convert_failures_are_one_line_and_leave_nothing(weights, tmp_path, capsys):
    folder = tmp_path / "work"
    folder.mkdir()
    config = folder / "bigger.json"
    values = to_dict(CONFIG)
    values["mask_decoder"]["num_layers"] = 2
    config.write_text(json.dumps(values))
    source = tmp_path / "m.pth"
    assert run("convert", weights, source) == 0
    capsys.readouterr()
    cases = [
        (("convert", tmp_path / "none.pth", folder / "x.safetensors"), "no checkpoint at"),
        (("convert", weights, folder / "x.safetensors", "--format", "ours"), "holds weights of ours already"),
        (("convert", weights, folder / "x.bin"), "ending must be .pth or .safetensors"),
        (("convert", weights, folder / "x", "--format", "transformers"), "no views"),
        (("convert", source, folder / "x.pth"), "end in .safetensors"),
        (("convert", source, folder / "x.safetensors", "--verify"), "--verify compares with PyTorch"),
        (("convert", source, folder / "x.safetensors", "--config", config), "nothing for our mask_decoder.layers.1"),
    ]
    for args, message in cases:
        assert run(*args) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert list(folder.iterdir()) == [config]


@pytest.mark.torch
def test_export_to_the_reference_verifies(weights, tmp_path, capsys):
    pytest.importorskip("torch")
    assert run("convert", weights, tmp_path / "model.pth", "--verify") == 0, capsys.readouterr().err
    assert "mask logits: max abs difference" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_export_to_transformers_verifies(backbone, model, tmp_path, capsys):
    """Random weights through `esg convert --format transformers --verify`, and back bit for bit."""
    pytest.importorskip("transformers")
    import dataclasses

    from esg_jax.models.backbones.resnet import ResNetConfig

    config = CONFIG.without_views(num_classes=3)
    if backbone == "resnet":
        resnet = ResNetConfig(depths=(1, 2, 1, 1), stem_channels=8, bottleneck_channels=8)
        config = dataclasses.replace(config, backbone=resnet)
    plain = CropFormer(config, rngs=nnx.Rngs(1))
    save_weights(tmp_path / "plain.safetensors", plain)
    command = ("convert", tmp_path / "plain.safetensors", tmp_path / "hf", "--format", "transformers", "--verify")
    assert run(*command) == 0, capsys.readouterr().err
    print(capsys.readouterr().out)
    loaded = esg_jax.load(tmp_path / "hf")
    assert loaded.config == config
    for name, value in named_arrays(plain).items():
        np.testing.assert_array_equal(value, named_arrays(loaded)[name], err_msg=name)
    assert run(*command, "--tolerance", "0") == 1


def test_sharded_restore_goes_straight_to_the_mesh(weights, tmp_path):
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from esg_jax.interop.checkpoints import load_checkpoint

    assert run("convert", weights, tmp_path / "m.pth") == 0
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    shardings = {
        name: NamedSharding(mesh, PartitionSpec("fsdp") if x.shape and x.shape[0] % 4 == 0 else PartitionSpec())
        for name, x in named_arrays(load_checkpoint(tmp_path / "m.pth")[0]).items()
    }
    loaded, _ = load_checkpoint(tmp_path / "m.pth", shardings=lambda name, _: shardings[name])
    for name, x in named_arrays(loaded).items():
        assert x.sharding.is_equivalent_to(shardings[name], x.ndim), name
