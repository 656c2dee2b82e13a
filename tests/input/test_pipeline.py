import json
import time

import numpy as np
import pytest
from PIL import Image

from esg_jax.config import from_dict, to_dict
from esg_jax.input.pipeline import DataConfig, EvalDataConfig, eval_dataset, train_dataset, train_iterator
from esg_jax.input.readers import SourceConfig
from esg_jax.masks import rle

COUNT = 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two data sets of tiny images: "wide" (8 landscape, 4 portrait, gray value = index) and "other" (value 200)."""
    root = tmp_path_factory.mktemp("sources")
    specs = {}
    for name, base in (("wide", 0), ("other", 200)):
        images, annotations = [], []
        for i in range(COUNT):
            height, width = (40, 60) if i < 8 else (60, 40)
            Image.fromarray(np.full((height, width, 3), base + i, np.uint8)).save(root / f"{name}{i}.png")
            images.append({"id": i, "file_name": f"{name}{i}.png", "height": height, "width": width})
            labels = np.arange(height)[:, None] * 3 // height + np.zeros(width, int)
            for encoded in map(rle.to_json, rle.encode_labels(labels + 1, 3)[: 0 if i == 3 else 3]):
                annotations.append({"id": len(annotations), "image_id": i, "category_id": 1, "segmentation": encoded})
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "entity"}]}
        (root / f"{name}.json").write_text(json.dumps(content))
        specs[name] = {"annotations": str(root / f"{name}.json")}
    return specs


def config(sources, **changes):
    fields = {
        "sources": sources,
        "short_edges": (24, 32),
        "max_size": 48,
        "buckets": ((32, 64), (64, 32)),
        "max_entities": 4,
        "batch_size": 4,
        "seed": 5,
    }
    return DataConfig(**{**fields, **changes})


def only(sources, name, **changes):
    return config({name: sources[name]}, **changes)


def identity(batch):
    """Gray value of every image: tells which record it is."""
    return batch["image"][:, 0, 0, 0, 0]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_batches_follow_the_contract(sources):
    batch = next(train_iterator(only(sources, "wide")))
    height, width = batch["image"].shape[2:4]
    assert (height, width) in ((32, 64), (64, 32))
    expected = {
        "image": (np.uint8, (4, 2, height, width, 3)),
        "size": (np.int32, (4, 2, 2)),
        "masks": (np.uint8, (4, 4, 2, height, width // 8)),
        "labels": (np.int32, (4, 4)),
        "present": (np.bool_, (4, 4)),
        "valid": (np.bool_, (4, 4, 2)),
    }
    assert {key: (value.dtype.type, value.shape) for key, value in batch.items()} == expected
    np.testing.assert_array_equal(batch["present"].sum(1), 3)


def test_lsj_and_whole_image_mappers(sources):
    batch = next(train_iterator(only(sources, "wide", mapper="lsj", lsj_size=64)))
    assert batch["image"].shape == (4, 1, 64, 64, 3)
    assert next(train_iterator(only(sources, "wide", mapper="entity_full")))["image"].shape[1] == 1


def test_an_epoch_shows_every_image_with_entities_once(sources):
    dataset = train_dataset(only(sources, "wide", mapper="entity_full", batch_size=1))
    seen = sorted(int(identity(dataset[i])[0]) for i in range(11))
    assert seen == [i for i in range(COUNT) if i != 3]
    dataset = train_dataset(only(sources, "wide", mapper="entity_full", batch_size=1, drop_empty=False))
    batches = [dataset[i] for i in range(12)]
    assert sorted(int(identity(batch)[0]) for batch in batches) == list(range(COUNT))
    empty = next(batch for batch in batches if identity(batch)[0] == 3)
    assert not empty["present"].any() and not empty["masks"].any()


def test_buckets_hold_their_images_in_proportion(sources):
    dataset = train_dataset(only(sources, "wide", batch_size=1))
    shapes = [dataset[i]["image"].shape[2:4] for i in range(110)]
    assert abs(shapes.count((32, 64)) - 70) <= 2 and abs(shapes.count((64, 32)) - 40) <= 2
    values = [int(identity(dataset[i])[0]) for i in range(110)]
    assert {v for v, s in zip(values, shapes, strict=True) if s == (64, 32)} == {8, 9, 10, 11}


def test_batches_depend_on_seed_and_position_only(sources):
    first, again, other = (train_dataset(only(sources, "wide", seed=seed)) for seed in (5, 5, 6))
    assert_same(first[7], again[7])
    assert any((identity(first[i]) != identity(other[i])).any() for i in range(6))
    # The second epoch is shuffled anew.
    order = [identity(train_dataset(only(sources, "wide", batch_size=1, buckets=((64, 64),)))[i])[0] for i in range(22)]
    assert sorted(order[:11]) == sorted(order[11:]) and order[:11] != order[11:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restored_iterator_gives_the_same_batches(sources, num_workers):
    data = config(sources, num_workers=num_workers)
    iterator = train_iterator(data)
    reference = train_dataset(data)
    for step in range(3):
        assert_same(next(iterator), reference[step])
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    iterator.close()
    fresh = train_iterator(data)
    fresh.set_state(state)
    for batch in expected:
        assert_same(next(fresh), batch)
    fresh.close()


def test_iterator_state_through_orbax(sources, tmp_path):
    from orbax.checkpoint import v1 as ocp

    iterator = train_iterator(config(sources))
    for _ in range(5):
        next(iterator)
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save_checkpointables(5, {"data": iterator, "state": {"step": np.array(5)}})
    expected = next(iterator)
    fresh = train_iterator(config(sources))
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.load_checkpointables(5, {"data": fresh, "state": {"step": np.array(0)}})
    assert_same(next(fresh), expected)


def test_mixture_weights(sources):
    specs = {"wide": {**sources["wide"], "weight": 3.0}, "other": {**sources["other"], "weight": 1.0}}
    dataset = train_dataset(config(specs, buckets=((64, 64),)))
    values = np.concatenate([identity(dataset[i]) for i in range(50)])
    assert (values >= 200).sum() == 50
    specs["other"]["weight"] = 0
    values = np.concatenate([identity(train_dataset(config(specs))[i]) for i in range(10)])
    assert (values < 200).all()


def test_batches_say_which_images_are_annotated_in_full(sources):
    """Only in a mixture where it makes a difference, and without changing anything else."""
    partial = {"wide": sources["wide"], "other": {**sources["other"], "exhaustive": False}}
    plain, marked = (train_dataset(config(specs, buckets=((64, 64),))) for specs in (sources, partial))
    for i in range(3):
        batch = marked[i]
        exhaustive = batch.pop("exhaustive")
        assert exhaustive.dtype == bool and exhaustive.shape == (4,)
        np.testing.assert_array_equal(exhaustive, identity(batch) < 200)
        assert_same(batch, plain[i])
    unused = {**partial, "other": {**partial["other"], "weight": 0.0}}
    assert "exhaustive" not in train_dataset(config(unused))[0]
    lsj = train_dataset(config(partial, mapper="lsj", lsj_size=64))[0]
    np.testing.assert_array_equal(lsj["exhaustive"], lsj["image"][:, 0].max((1, 2, 3)) < 200)


def test_augmentation_is_off_by_default_and_follows_seed_and_position(sources):
    plain = train_dataset(config(sources))
    changed = {"zoom": (0.5, 2.0), "colour": 1.0}
    first, again = (train_dataset(config(sources, **changed)) for _ in range(2))
    for i in range(3):
        assert_same(first[i], again[i])
        assert first[i]["image"].shape == plain[i]["image"].shape
        np.testing.assert_array_equal(first[i]["size"], plain[i]["size"])  # flip, edge and corner are drawn as ever
        assert (first[i]["image"] != plain[i]["image"]).any()
    neutral = train_dataset(config(sources, zoom=(1, 1), colour=0))
    assert_same(neutral[0], plain[0])


def test_hosts_share_the_epoch_and_see_every_source(sources):
    data = config(sources, buckets=((64, 64),))
    hosts = [train_dataset(data, process, 2) for process in range(2)]
    for host in hosts:
        values = np.concatenate([identity(host[i]) for i in range(20)])
        assert len(values) == 40
        assert (values >= 200).sum() == 20
    data = only(sources, "wide", buckets=((64, 64),), batch_size=2)
    hosts = [train_dataset(data, process, 2) for process in range(2)]
    seen = [int(identity(hosts[i % 2][i // 2])[0]) for i in range(11)]
    assert sorted(seen) == [i for i in range(COUNT) if i != 3]


def test_hosts_agree_on_the_bucket_of_every_step(sources):
    hosts = [train_dataset(config(sources), process, 4) for process in range(4)]
    for step in range(12):
        assert len({host[step]["image"].shape for host in hosts}) == 1


def test_worker_count_of_threads_does_not_change_batches(sources):
    a, b = (train_iterator(config(sources, num_threads=threads)) for threads in (0, 4))
    for _ in range(4):
        assert_same(next(a), next(b))


def test_eval_dataset_is_in_order_and_sharded(sources):
    data = EvalDataConfig(SourceConfig(**sources["wide"]), num_views=5, short_edge=24, max_size=48)
    examples = list(eval_dataset(data))
    assert [example.record.image_id for example in examples] == list(range(COUNT))
    assert examples[0].image.shape == (5, 32, 64, 3) and examples[8].image.shape == (5, 64, 32, 3)
    np.testing.assert_array_equal(examples[0].boxes[4], [18, 12, 60, 40])
    assert len(examples[3].record.load_entities().labels) == 0
    share = list(eval_dataset(data, process_index=1, process_count=5))
    assert [example.record.image_id for example in share] == [1, 6, 11]


def test_wrong_configurations_are_named(sources):
    for changes, message in [
        ({"mapper": "crop"}, "data.mapper is 'crop'"),
        ({"buckets": ((30, 64),)}, "data.buckets"),
        ({"sources": {"a": {"annotation": "x"}}}, "data.sources.a.annotation"),
        ({"zoom": (2.0, 1.0)}, "data.zoom is"),
        ({"zoom": (0.0, 1.0)}, "data.zoom is"),
        ({"colour": 2.0}, "data.colour is 2.0"),
        ({"colour": 0.5, "mapper": "lsj"}, "are for the entity mappers, not for 'lsj'"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(**{"sources": sources, **changes})
    with pytest.raises(ValueError, match="needs a padded size of 32x48"):
        train_dataset(only(sources, "wide", buckets=((32, 32),)))
    with pytest.raises(ValueError, match="batch_size 4 does not divide among 3"):
        train_dataset(config(sources), 0, 3)
    with pytest.raises(ValueError, match="data.sources is empty"):
        train_dataset(config({}))


def test_images_with_too_many_entities_are_counted(sources, caplog):
    with caplog.at_level("INFO"):
        train_dataset(only(sources, "wide", max_entities=2))
    assert "12 images, 1 of them without entities (left out); 11 have more than 2 entities" in caplog.text


def test_config_survives_the_dictionary_form(sources):
    data = config(sources)
    assert from_dict(DataConfig, json.loads(json.dumps(to_dict(data)))) == data


def test_a_corrupt_image_stops_training_with_its_name(sources, tmp_path):
    content = json.loads(open(sources["wide"]["annotations"]).read())
    (tmp_path / "a.json").write_text(json.dumps(content))
    for image in content["images"]:
        (tmp_path / image["file_name"]).write_bytes(b"broken")
    started = time.time()
    with pytest.raises(ValueError, match=r"cannot read image .*wide\d+.png"):
        next(train_iterator(config({"a": {"annotations": str(tmp_path / "a.json")}})))
    assert time.time() - started < 10
