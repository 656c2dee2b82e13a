"""CLIP, LLaMA and LLaVA: names and shapes of the published files, round trips, outputs of transformers' models."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

import esg_jax
from esg_jax.interop.checkpoints import convert_to_file, load_checkpoint, load_part, save_arrays, save_checkpoint
from esg_jax.interop.convert import (
    ConversionError,
    Report,
    Stacked,
    from_ours,
    load_into,
    our_shapes,
    stream_from_ours,
    stream_to_ours,
    targets_of,
    to_ours,
)
from esg_jax.interop.families import detect
from esg_jax.interop.families.clip import CLIP_VISION
from esg_jax.interop.families.llama import LLAMA as LLAMA_TABLE
from esg_jax.interop.families.llama import infer_llama
from esg_jax.interop.families.llava import LLAVA as LLAVA_TABLE
from esg_jax.interop.families.llava import LLAVA_IN_MEMORY
from esg_jax.interop.families.llava_original import llava_original_table
from esg_jax.interop.readers import open_checkpoint, reader_of
from esg_jax.models.language.clip import Clip, ClipConfig, ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from esg_jax.models.language.llama import Llama, LlamaConfig, with_new_tokens
from esg_jax.models.language.llava import Llava, LlavaConfig, Projector

ORIGINAL = llava_original_table("mlp2x_gelu")
LLAVA_13B = LlavaConfig.llava_13b()
LLAMA_7B = LlamaConfig.llama_7b(vocab_size=32000)
# File -> (model, configuration, name of the format, table, whether that table writes these very names).
MANIFESTS = {
    "clip_vit_l_336": (ClipVision, ClipVisionConfig(), "CLIP image side", CLIP_VISION, True),
    "alt/clip_vit_l_336.transformers5": (ClipVision, ClipVisionConfig(), "CLIP image side", CLIP_VISION, False),
    "llama_7b": (Llama, LLAMA_7B, "LLaMA", LLAMA_TABLE, True),
    "alt/llama_7b.transformers5": (Llama, LLAMA_7B, "LLaMA", LLAMA_TABLE, True),
    "llava15_7b": (Llava, LlavaConfig(), "LLaVA of transformers", LLAVA_TABLE, True),
    "llava15_13b": (Llava, LLAVA_13B, "LLaVA of transformers", LLAVA_TABLE, True),
    "alt/llava15_7b.transformers5": (
        *(Llava, LlavaConfig(), "LLaVA of transformers (names in memory)"),
        *(LLAVA_IN_MEMORY, True),
    ),
    "alt/llava15_13b.transformers5": (
        *(Llava, LLAVA_13B, "LLaVA of transformers (names in memory)"),
        *(LLAVA_IN_MEMORY, True),
    ),
    "alt/llava15_7b.liuhaotian": (Llava, LlavaConfig(), "LLaVA (original)", ORIGINAL, True),
    "alt/llava15_13b.liuhaotian": (Llava, LLAVA_13B, "LLaVA (original)", ORIGINAL, True),
}

VISION = ClipVisionConfig.tiny()
TEXT = ClipTextConfig(
    vocab_size=50, max_length=9, width=24, num_layers=2, num_heads=3, ffn_dim=40, eos_id=49, projection_dim=20
)
LLAMA = LlamaConfig(vocab_size=70, width=24, num_layers=3, num_heads=6, num_kv_heads=2, ffn_dim=40, max_length=64)
LLAVA = LlavaConfig(VISION, LLAMA, image_id=60)
TINY = {
    "clip": (Clip, ClipConfig(VISION, TEXT)),
    "clip image side": (ClipVision, VISION),
    "clip text side": (ClipText, TEXT),
    "clip text side without projection": (ClipText, dataclasses.replace(TEXT, projection_dim=None)),
    "llama": (Llama, dataclasses.replace(LLAMA, num_kv_heads=6, norm_eps=1e-6)),
    "llama, grouped and tied": (Llama, dataclasses.replace(LLAMA, tied=True, rope_base=5e5)),
    "llava": (Llava, LLAVA),
}


def shapes_of(cls, config):
    return targets_of(abstract(cls, config))


@functools.cache
def abstract(cls, config):
    return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))


def empty(shapes):
    """Arrays of the given shapes that take no memory."""
    return {name: np.broadcast_to(np.zeros((), np.float32), getattr(x, "shape", x)) for name, x in shapes.items()}


def random_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(scale=0.3, size=x.shape).astype(np.float32) for name, x in shapes.items()}


@functools.cache
def random_model(name):
    cls, config = TINY[name]
    return load_into(abstract(cls, config), random_arrays(shapes_of(cls, config)))


def assert_equal(model, wanted):
    wanted = targets_of(wanted)
    for key, value in targets_of(model).items():
        np.testing.assert_array_equal(value, wanted[key], err_msg=key)


@pytest.mark.parametrize("name", MANIFESTS)
def test_names_and_shapes_are_exact(name, shared):
    cls, config, format_name, table, same_names = MANIFESTS[name]
    manifest = json.loads(shared("manifests", f"{name}.json").read_text())
    ours = shapes_of(cls, config)
    if format_name == "LLaVA (original)":
        written = {n: x for n, x in ours.items() if not n.startswith("vision.")}
        rows = ("model.embed_tokens.weight", "lm_head.weight")
        written = {n: x[:32000] if n in rows else x for n, x in stream_from_ours(empty(written), table)}
    else:
        written = from_ours(empty(ours), table)
    if same_names:
        assert {key: list(x.shape) for key, x in written.items()} == manifest
    else:
        assert {key.removeprefix("vision_model."): list(x.shape) for key, x in written.items()} == manifest

    reader = reader_of(empty(manifest))
    family, found = detect(reader)
    assert (found.name, family.model) == (format_name, cls)
    assert family.infer(our_shapes(reader, found.table)) == config
    # Names are accounted for before the first array comes; ask for the smallest first.
    small_first = dict(sorted(ours.items(), key=lambda item: item[1].size))
    report = Report()
    arrays = stream_to_ours(
        reader,
        small_first,
        found.table,
        allow_missing=r"^vision\." if format_name == "LLaVA (original)" else None,
        report=report,
    )
    next(arrays)
    assert sorted(report.used) == sorted(manifest)
    assert not (report.ignored or report.dropped or report.buffers)
    # Every array of ours gets its shape; the vocabulary may grow.
    shapes = our_shapes(reader, found.table)
    for key, x in ours.items():
        if key not in report.missing and x.shape != shapes[key]:
            assert (key, x.shape[0] - shapes[key][0], x.shape[-1] - shapes[key][-1]) in (
                ("llm.embed.embedding", 64, 0),
                ("llm.head.kernel", 0, 64),
            )


@pytest.mark.parametrize("name", TINY)
def test_round_trip_through_files_is_bit_equal(name, tmp_path):
    """In shards, read back from config.json; then from the weights file of ours to the very same files."""
    model = random_model(name)
    arrays = {key: np.asarray(x) for key, x in targets_of(model).items()}
    files = save_arrays(tmp_path / "out", arrays, model.config, max_shard_bytes=30_000)
    assert any(file.name.endswith("index.json") for file in files)
    again = esg_jax.load(tmp_path / "out")
    assert again.config == model.config
    assert_equal(again, model)

    from esg_jax.weights import save_weights

    save_weights(tmp_path / "ours.safetensors", model)
    assert_equal(esg_jax.load(tmp_path / "ours.safetensors"), model)
    reader = open_checkpoint(tmp_path / "ours.safetensors")
    for file in save_arrays(tmp_path / "again", reader, model.config, max_shard_bytes=30_000):
        if file.suffix == ".safetensors":
            first, second = (open_checkpoint(tmp_path / folder / file.name) for folder in ("out", "again"))
            assert list(first) == list(second)
            for key in first:
                np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.mark.parametrize("table", [LLAVA_TABLE, LLAVA_IN_MEMORY, ORIGINAL], ids=["disk", "memory", "original"])
def test_llava_round_trips_with_permuted_keys(table):
    ours = random_arrays(shapes_of(Llava, LLAVA))
    theirs = from_ours(ours, table)
    shuffled = {name: theirs[name] for name in np.random.default_rng(0).permutation(list(theirs))}
    # Buffers of old files mean nothing.
    shuffled["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    shuffled["vision_tower.vision_model.embeddings.position_ids"] = np.zeros((1, 17), np.int64)
    back, report = to_ours(shuffled, ours, detect(shuffled)[1].table)
    assert len(report.dropped) == 2
    for key, value in ours.items():
        np.testing.assert_array_equal(value, back[key], err_msg=key)


@pytest.mark.parametrize(
    ("table", "rename"),
    [
        (LLAVA_TABLE, ("vision_tower.vision_model.", "vision_tower.")),
        (LLAVA_IN_MEMORY, ("model.vision_tower.", "model.vision_tower.vision_model.")),
        (ORIGINAL, ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower.")),
    ],
    ids=["transformers 5", "transformers 4.57", "original"],
)
def test_spellings_of_the_image_side(table, rename):
    ours = random_arrays(shapes_of(Llava, LLAVA))
    renamed = {name.replace(*rename): x for name, x in from_ours(ours, table).items()}
    back, _ = to_ours(renamed, ours, detect(renamed)[1].table)
    np.testing.assert_array_equal(back["vision.layers.fc1.kernel"], ours["vision.layers.fc1.kernel"])


def test_linear_projector_has_its_own_names(tmp_path):
    config = dataclasses.replace(LLAVA, projector="linear")
    model = load_into(abstract(Llava, config), random_arrays(shapes_of(Llava, config)))
    save_checkpoint(tmp_path / "out", model, "original")
    assert "model.mm_projector.weight" in open_checkpoint(tmp_path / "out")
    again, _ = load_checkpoint(tmp_path / "out", config=config)
    assert_equal(again, model)
    with pytest.raises(ConversionError, match="no linear projector; write the original layout"):
        save_checkpoint(tmp_path / "hf", model)
    assert not (tmp_path / "hf").exists()


def test_original_llava_grows_and_takes_clip_from_elsewhere(tmp_path):
    """As with the published files: 32000 rows there, rows for new tokens here, CLIP in a file of its own."""
    model = random_model("llava")
    arrays = {key: np.asarray(x) for key, x in targets_of(model).items()}
    save_arrays(tmp_path / "out", arrays, LLAVA, "original", vocab_size=60, leave_out=r"^vision\.")
    clip = nnx.clone(random_model("clip"))
    clip.vision = model.vision
    save_checkpoint(tmp_path / "clip", clip)
    with pytest.raises(ConversionError, match=r"nothing for our vision\.class_embed"):
        load_checkpoint(tmp_path / "out", config=LLAVA)
    again, report = load_checkpoint(tmp_path / "out", config=LLAVA, vision=tmp_path / "clip")
    assert report.grown == ["llm.embed.embedding", "llm.head.kernel"]
    for key, value in targets_of(again).items():
        if key == "llm.embed.embedding":
            np.testing.assert_array_equal(value[:60], arrays[key][:60])
            np.testing.assert_allclose(value[60:], np.tile(arrays[key][:60].mean(0), (10, 1)), atol=1e-6)
        elif key == "llm.head.kernel":
            np.testing.assert_array_equal(value[:, :60], arrays[key][:, :60])
            np.testing.assert_allclose(value[:, 60:].T, np.tile(arrays[key][:, :60].mean(1), (10, 1)), atol=1e-6)
        else:
            np.testing.assert_array_equal(value, arrays[key], err_msg=key)
    with pytest.raises(ConversionError, match="not of CLIP's image side"):
        load_checkpoint(tmp_path / "out", config=LLAVA, vision=tmp_path / "out")
    with pytest.raises(ConversionError, match="needs no checkpoint of CLIP"):
        load_checkpoint(tmp_path / "clip", vision=tmp_path / "clip")
    save_checkpoint(tmp_path / "whole", model, "original")
    with pytest.raises(ConversionError, match="holds its own CLIP"):
        load_checkpoint(tmp_path / "whole", vision=tmp_path / "clip")


def test_parts(tmp_path):
    model = random_model("llava")
    save_checkpoint(tmp_path / "out", model)
    larger = dataclasses.replace(LLAMA, vocab_size=128)
    llm, report = load_part(abstract(Llama, larger), tmp_path / "out")
    assert len(report.grown) == 2 and not report.missing and not report.ignored
    np.testing.assert_array_equal(llm.embed.embedding[:70], model.llm.embed.embedding[...])
    vision, _ = load_part(abstract(ClipVision, VISION), tmp_path / "out")
    assert_equal(vision, model.vision)
    projector = nnx.eval_shape(lambda: Projector("mlp2x_gelu", VISION.width, LLAMA.width, rngs=nnx.Rngs(0)))
    assert_equal(load_part(projector, tmp_path / "out")[0], model.projector)
    with pytest.raises(ConversionError, match=r"LLaVA of transformers\) holds no ClipText"):
        load_part(abstract(ClipText, TEXT), tmp_path / "out")
    save_checkpoint(tmp_path / "clip", random_model("clip"))
    assert_equal(load_part(abstract(ClipText, TEXT), tmp_path / "clip")[0], random_model("clip").text)
    save_checkpoint(tmp_path / "vision", model.vision)
    assert_equal(load_part(abstract(ClipVision, VISION), tmp_path / "vision")[0], model.vision)


@pytest.mark.parametrize("name", ["llama", "llama, grouped and tied"])
def test_new_tokens_start_as_the_mean(name):
    model = random_model(name)
    new = with_new_tokens(model, (62, 63), known=60)
    embedding = np.array(model.embed.embedding[...])
    embedding[[62, 63]] = embedding[:60].mean(0)
    np.testing.assert_allclose(new.embed.embedding[...], embedding, atol=1e-6)
    if not model.config.tied:
        head = np.array(model.head.kernel[...])
        head[:, [62, 63]] = head[:, :60].mean(1, keepdims=True)
        np.testing.assert_allclose(new.head.kernel[...], head, atol=1e-6)
    with pytest.raises(ValueError, match=r"\[3\] must be within \[60, 69\]"):
        with_new_tokens(model, (3,), known=60)


@pytest.fixture
def state():
    ours = random_arrays(shapes_of(Llava, LLAVA))
    return ours, from_ours(ours, LLAVA_TABLE)


GATE = "language_model.model.layers.{}.mlp.gate_proj.weight"


def test_missing_layer(state):
    ours, theirs = state
    del theirs[GATE.format(1)]
    with pytest.raises(ConversionError, match=f"lacks {GATE.format(1)}"):
        to_ours(theirs, ours, LLAVA_TABLE)


def test_layer_the_model_does_not_have(state):
    ours, theirs = state
    theirs[GATE.format(3)] = theirs[GATE.format(2)]
    with pytest.raises(ConversionError, match=f"no use for {GATE.format(3)}"):
        to_ours(theirs, ours, LLAVA_TABLE)
    _, report = to_ours(theirs, ours, LLAVA_TABLE, allow_unused=r"layers\.3\.")
    assert report.ignored == [GATE.format(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x[:-1],
            r"layers\.1\.mlp\.gate_proj\.weight gives .*gate\.kernel\[1\] the shape \(24, 39\)",
        ),
        (lambda x: x.astype(np.int32), r"layers\.1\.mlp\.gate_proj\.weight holds int32 numbers"),
        (lambda x: x[0], r"gate_proj\.weight \(24,\) cannot become .*gate\.kernel"),
    ],
    ids=["shape", "type", "rank"],
)
def test_wrong_layer_leaves_no_file(state, change, message, tmp_path):
    _, theirs = state
    theirs[GATE.format(1)] = change(theirs[GATE.format(1)])
    with pytest.raises(ConversionError, match=message):
        convert_to_file(reader_of(theirs), tmp_path / "ours.safetensors", config=LLAVA)
    assert not list(tmp_path.iterdir())


def test_a_smaller_vocabulary_is_an_error(state):
    ours, theirs = state
    small = dataclasses.replace(LLAVA, llm=dataclasses.replace(LLAMA, vocab_size=64))
    with pytest.raises(ConversionError, match=r"embed_tokens\.weight gives .* the shape \(70, 24\), .* \(64, 24\)"):
        to_ours(theirs, shapes_of(Llava, small), LLAVA_TABLE)


def test_failed_shard_leaves_nothing(tmp_path):
    arrays = random_arrays(shapes_of(Llama, LLAMA))

    class Broken(dict):
        def __getitem__(self, name):
            if name == "norm.scale":
                raise OSError("disk")
            return super().__getitem__(name)

        def items(self):  # shapes are known before anything is written
            return arrays.items()

        def values(self):
            return arrays.values()

    with pytest.raises(OSError, match="disk"):
        save_arrays(tmp_path / "out", Broken(arrays), LLAMA, max_shard_bytes=5_000)
    assert not list((tmp_path / "out").iterdir())


def test_formats_a_model_does_not_have(tmp_path):
    with pytest.raises(ConversionError, match="no format 'original' for a LlamaConfig; choose transformers"):
        save_checkpoint(tmp_path / "x", random_model("llama"), "original")
    with pytest.raises(ConversionError, match=r"vocab_size 71 must be within \[1, 70\]"):
        save_arrays(tmp_path / "x", targets_of(random_model("llama")), random_model("llama").config, vocab_size=71)
    assert not list(tmp_path.iterdir())


def test_heads_that_shapes_do_not_show():
    shapes = {name: x.shape for name, x in shapes_of(Llama, LLAMA).items()}
    with pytest.raises(ConversionError, match="24 channels wide, no multiple of 128: name its heads with --num-heads"):
        infer_llama(shapes)
    assert infer_llama(shapes, 6).num_kv_heads == 2


def test_layers_are_read_one_by_one():
    """Nothing is read before it is asked for, and a stacked array is put together from single layers."""
    ours = random_arrays(shapes_of(Llava, LLAVA))
    theirs = from_ours(ours, LLAVA_TABLE)
    reads = []

    class Counting(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    wanted = ("llm.layers.mlp.gate.kernel",)
    for name, array in stream_to_ours(Counting(theirs), ours, LLAVA_TABLE):
        if name in wanted:
            assert isinstance(array, Stacked) and array.shape == ours[name].shape
            before = len(reads)
            layers = iter(array)
            next(layers)
            assert reads[before:] == [GATE.format(0)]
            next(layers)
            assert reads[before:] == [GATE.format(0), GATE.format(1)]


def test_sharded_restore_goes_straight_to_the_mesh(tmp_path):
    model = random_model("llama")
    save_checkpoint(tmp_path / "out", model)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    shardings = {}
    for name, x in targets_of(model).items():
        axis = next((i for i in reversed(range(x.ndim)) if i and x.shape[i] % 2 == 0), None)
        spec = [None] * x.ndim
        if axis:
            spec[axis] = "model"
        shardings[name] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    again, _ = load_checkpoint(tmp_path / "out", shardings=lambda name, _: shardings[name])
    for name, x in targets_of(again).items():
        assert x.sharding.is_equivalent_to(shardings[name], x.ndim), name
    assert_equal(again, model)


@pytest.mark.torch
@pytest.mark.parametrize("name", TINY)
def test_transformers_gives_the_same_outputs(name, tmp_path):
    """The files that we write load completely in transformers, and those that it writes in ours."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from esg_jax.interop.families import written_family

    model = random_model(name)
    save_checkpoint(tmp_path / "ours", model)
    for item in written_family(model.config).verify(tmp_path / "ours", model):
        assert item.absolute < 1e-4, item
    (architecture,) = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"]
    theirs = getattr(transformers, architecture).from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again, report = load_checkpoint(tmp_path / "theirs")
    assert not report.ignored
    assert again.config == model.config
    assert_equal(again, model)


@pytest.mark.torch
def test_llava_with_prompts_of_different_lengths(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = random_model("llava")
    save_checkpoint(tmp_path / "out", model)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    image = np.random.default_rng(2).normal(size=(2, 32, 32, 3)).astype(np.float32)
    places = [LLAVA.image_id] * VISION.grid**2
    rows = [[1, 5, 7, *places, 8, 9, 10, 11, 12], [1, *places, 3]]
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            pixel_values=torch.from_numpy(image.transpose(0, 3, 1, 2).copy()),
        ).logits.numpy()
    logits = np.asarray(nnx.jit(Llava.__call__)(model, image, ids))
    for index, row in enumerate(rows):
        np.testing.assert_allclose(logits[index, : len(row)], wanted[index, : len(row)], atol=1e-4, rtol=1e-4)


def run(*args):
    from esg_jax import cli

    return cli.main([str(arg) for arg in args])


@pytest.mark.torch
def test_command_line(tmp_path, capsys):
    pytest.importorskip("transformers")
    from esg_jax.weights import save_weights

    ours = tmp_path / "ours.safetensors"
    save_weights(ours, random_model("llava"))
    assert run("convert", ours, tmp_path / "hf", "--verify") == 0, capsys.readouterr().err
    assert "logits: max abs difference" in capsys.readouterr().out
    assert run("convert", tmp_path / "hf", tmp_path / "half.safetensors", "--dtype", "bfloat16") == 0
    half = open_checkpoint(tmp_path / "half.safetensors")
    for key, value in targets_of(random_model("llava")).items():
        np.testing.assert_array_equal(half[key], np.asarray(value).astype(half.dtype(key)), err_msg=key)
    original = ("convert", ours, tmp_path / "original", "--format", "original")
    assert run(*original, "--vocab-size", 60, "--allow-unused", "^vision") == 0
    assert run("convert", ours, tmp_path / "x", "--format", "reference") == 1
    assert "no format 'reference' for a LlavaConfig; choose transformers, original" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert run(*original, "--verify") == 1
    assert "LlavaLlamaForCausalLM is not a model of transformers" in capsys.readouterr().err


def test_a_part_is_not_exported(tmp_path, capsys):
    from esg_jax.weights import save_weights

    save_weights(tmp_path / "llama.safetensors", random_model("llama"))
    assert run("export", tmp_path / "llama.safetensors", tmp_path / "program") == 1
    assert "no system has a model of type LlamaConfig; choose one of CropFormerConfig" in capsys.readouterr().err
    assert not (tmp_path / "program").exists()
