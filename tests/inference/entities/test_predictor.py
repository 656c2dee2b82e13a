import jax
import numpy as np
import pytest
from PIL import Image

from esg_jax.inference import Predictor
from esg_jax.input.image_io import ImageError
from esg_jax.interop.checkpoints import save_checkpoint
from esg_jax.sharding import make_mesh

# One padded size for all tests: compilation is what takes their time.
SIZES = dict(min_size=64, max_size=96, buckets=[(96, 96)])


def photo(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def predictor(tiny_model):
    return Predictor(tiny_model, **SIZES)


def test_end_to_end_matches_reference(shared, reference_model):
    golden = np.load(shared("fixtures", "cropformer", "infer_dev.npz"))
    model, image = reference_model(golden), golden["input/original_image_rgb_uint8"]
    five = Predictor(model, min_size=64, max_size=100)(image)
    np.testing.assert_array_equal(five.queries, golden["out/inference/query_order"])
    np.testing.assert_allclose(five.scores, golden["out/inference/scores"], atol=1e-4)
    near = np.any(np.abs(golden["mid/inference/fused_prob_by_query"] - 0.5) < 1e-4, axis=0)
    differs = np.any(five.masks != golden["out/inference/pred_masks"].astype(bool), axis=0)
    assert near.sum() < 20 and not np.any(differs & ~near)

    one = Predictor(model, views=1, min_size=64, max_size=100)(image)
    np.testing.assert_allclose(one.scores, golden["out/mask2former/inference_scores"], atol=1e-4)
    assert np.mean(one.masks != golden["out/mask2former/inference_masks"].astype(bool)) < 1e-4


def test_batch_equals_single_images_in_the_order_given(predictor):
    images = [photo(70, 100, 0), photo(100, 70, 1), photo(75, 107, 2), photo(70, 100, 3)]
    batch = predictor.predict_batch(images)
    assert [prediction.size for prediction in batch] == [(70, 100), (100, 70), (75, 107), (70, 100)]
    for image, together in zip(images, batch, strict=True):
        alone = predictor(image)
        assert len(alone) == 7 and (alone.label_map > 0).any()
        np.testing.assert_array_equal(together.queries, alone.queries)
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)
        assert np.mean(together.label_map != alone.label_map) < 1e-3


def test_split_over_devices_equals_one_device(predictor, tiny_model):
    spread = Predictor(tiny_model, mesh=make_mesh(2, 1, 1, devices=jax.devices()[:2]), **SIZES)
    images = [photo(70, 100, seed) for seed in range(3)]  # three images on two devices: one is filled up
    for together, alone in zip(spread.predict_batch(images), predictor.predict_batch(images), strict=True):
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)
        assert np.mean(together.label_map != alone.label_map) < 1e-3


def test_buckets_bound_the_programs(tiny_model):
    predictor = Predictor(tiny_model, views=1, **SIZES)
    for height, width in ((64, 64), (70, 100), (90, 64), (33, 48)):
        assert predictor(photo(height, width)).size == (height, width)
    assert predictor._forward.num_variants == 1
    with pytest.raises(ValueError, match=r"larger than every bucket.*\(64, 64\)"):
        Predictor(tiny_model, min_size=64, max_size=96, buckets=[(64, 64)])(photo(70, 100))


def test_default_padding_is_the_next_multiple_of_32(tiny_model):
    predictor, image = Predictor(tiny_model, min_size=64, max_size=100), photo(90, 131)
    framing = predictor.frame(image)
    assert framing.padded == (64, 96) and predictor.view_pixels(image, framing).shape == (5, 64, 96, 3)


def test_bad_files_do_not_stop_the_rest(predictor, tmp_path):
    Image.fromarray(photo(70, 100)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = [tmp_path / "bad.png", tmp_path / "good.png", tmp_path / "missing.png"]
    results = dict(predictor.predict_many(paths))
    assert isinstance(results[0], ImageError) and "bad.png" in str(results[0])
    assert results[1].size == (70, 100)
    assert isinstance(results[2], FileNotFoundError)
    with pytest.raises(ImageError, match=r"bad\.png"):
        predictor.predict_batch(paths)


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (300, 1)])
def test_extreme_shapes(predictor, shape):
    assert predictor(photo(*shape)).size == shape


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)])
def test_refuses_other_arrays(predictor, image):
    with pytest.raises(ValueError, match="RGB uint8"):
        predictor(image)


def test_refuses_impossible_options(tiny_model, tiny_class_model):
    with pytest.raises(ValueError, match="no view association"):
        Predictor(tiny_class_model, views=5)
    with pytest.raises(ValueError, match="choose 1"):
        Predictor(tiny_model, views=3)
    with pytest.raises(ValueError, match="min_size"):
        Predictor(tiny_model, min_size=900, max_size=800)
    with pytest.raises(ValueError, match="multiples of 32"):
        Predictor(tiny_model, buckets=[(100, 100)])
    with pytest.raises(ValueError, match="not a valid ScoreMode"):
        Predictor(tiny_model, score_mode="best")
    with pytest.raises(ValueError, match="3 classes"):
        Predictor(tiny_class_model)(photo(64, 64))


def test_class_aware_model(tiny_class_model):
    predictor = Predictor(tiny_class_model, **SIZES)
    image = photo(70, 100)
    instances = predictor.predict_instances(image, limit=5)
    assert len(instances) == 5 and instances.masks.shape == (5, 70, 100)
    assert np.all(np.diff(instances.scores) <= 0)
    semantic = predictor.predict_semantic(image)
    assert semantic.shape == (70, 100) and set(np.unique(semantic)) <= {0, 1, 2}
    panoptic = predictor.predict_panoptic(image, [True, False, True], score_threshold=0.1, overlap=0.0)
    assert panoptic.segment_map.shape == (70, 100)
    ids = {segment.id for segment in panoptic.segments}
    assert ids and ids == set(np.unique(panoptic.segment_map)) - {0}
    with pytest.raises(ValueError, match="2 entries, the model has 3 classes"):
        predictor.predict_panoptic(image, [True, False])


def test_checkpoint_defaults_and_overrides(tiny_checkpoint, predictor):
    image = photo(70, 100)
    loaded = Predictor.from_checkpoint(tiny_checkpoint, buckets=SIZES["buckets"])
    assert (loaded.min_size, loaded.max_size, loaded.views) == (64, 96, 5)
    np.testing.assert_array_equal(loaded(image).label_map, predictor(image).label_map)
    assert Predictor.from_checkpoint(tiny_checkpoint, views=1, min_size=32).min_size == 32


def test_pytorch_checkpoint_predicts_the_same(tiny_model, predictor, tmp_path):
    path = tmp_path / "reference.pth"
    save_checkpoint(path, tiny_model, "reference")
    image = photo(70, 100)
    np.testing.assert_array_equal(Predictor.from_checkpoint(path, **SIZES)(image).label_map, predictor(image).label_map)
