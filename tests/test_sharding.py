"""The sharding table: first match, fallback, and errors that name what is wrong; and what the compiler makes of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from esg_jax.losses.gella import GellaLossConfig
from esg_jax.models.gella import Gella
from esg_jax.models.language.llama import LlamaConfig
from esg_jax.sharding import (
    DEFAULT_RULES,
    LargestDim,
    format_rules,
    make_mesh,
    parse_rules,
    partition_specs,
    put_batch,
    tree_shardings,
)
from esg_jax.train.optim import OptimConfig
from esg_jax.train.state import ModelDef
from esg_jax.train.step import TrainStep
from esg_jax.train.tasks import GroundingTask


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 4, 2)


def test_first_match_decides(mesh):
    rules = ((r"out\.kernel$", P("model", "fsdp")), (r"kernel$", P("fsdp", "model")), (r"", P()))
    specs = partition_specs({"a.out.kernel": shape(8, 8), "a.kernel": shape(8, 8), "a.bias": shape(8)}, rules, mesh)
    assert specs == {"a.out.kernel": P("model", "fsdp"), "a.kernel": P("fsdp", "model"), "a.bias": P()}


def test_unmatched_parameter_is_named(mesh):
    with pytest.raises(ValueError, match=r"no sharding rule matches parameter 'head.bias' of shape \(3,\)"):
        partition_specs({"head.bias": shape(3)}, ((r"kernel$", P()),), mesh)


def test_indivisible_dimension_is_named(mesh):
    with pytest.raises(ValueError, match=r"dimension 0 of 'head.kernel' with shape \(6, 8\) in 4"):
        partition_specs({"head.kernel": shape(6, 8)}, ((r"kernel$", P("fsdp", "model")),), mesh)


def test_too_many_entries_are_named(mesh):
    with pytest.raises(ValueError, match="more entries than 'x' of shape"):
        partition_specs({"x": shape(8)}, ((r"", P("fsdp", "model")),), mesh)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((3, 3, 64, 256), P(None, None, None, "fsdp")),
        ((256, 64), P("fsdp", None)),
        ((1001, 256), P(None, "fsdp")),  # the largest does not divide
        ((64, 64), P()),  # below min_size
        ((1001, 333), P()),  # nothing divides
    ],
)
def test_fallback_splits_the_largest_divisible_dimension(mesh, sizes, expected):
    assert partition_specs({"x": shape(*sizes)}, ((r"", LargestDim()),), mesh) == {"x": expected}


def test_moments_follow_their_parameters(mesh):
    specs = {"a.kernel": P("fsdp", "model")}
    tree = {"params": {"a.kernel": shape(8, 8)}, "mu": [{"a.kernel": shape(8, 8)}], "count": shape()}
    placed = tree_shardings(tree, specs, mesh)
    assert placed["mu"][0]["a.kernel"].spec == P("fsdp", "model")
    assert placed["count"].spec == P()


def test_mesh_must_use_all_devices():
    with pytest.raises(ValueError, match=r"\(3, 2, 1\) need 6 devices, but there are 8"):
        make_mesh(3, 2, 1)
    assert make_mesh(2, -1, 2).shape == {"data": 2, "fsdp": 2, "model": 2}


def test_batch_must_divide_over_devices(mesh):
    with pytest.raises(ValueError, match="batch size 6 does not divide over 4 devices"):
        put_batch({"image": np.zeros((6, 2))}, mesh)
    assert put_batch({"image": np.zeros((8, 2))}, mesh)["image"].sharding.spec == P(("data", "fsdp"))


@pytest.mark.slow
def test_language_model_works_on_its_own_rows(tiny_gella_config):
    """FSDP gathers weights. Left alone the partitioner sums activations of the whole batch over devices instead."""
    llm = LlamaConfig(vocab_size=64, width=128, num_layers=3, num_heads=4, num_kv_heads=4, ffn_dim=256)
    config = dataclasses.replace(tiny_gella_config, llm=llm, lora=None)
    step = TrainStep(
        ModelDef(lambda: Gella(config, rngs=nnx.Rngs(0), remat=True)),
        GroundingTask(GellaLossConfig(), config.num_queries),
        optim=OptimConfig(),
        total_steps=10,
        mesh=make_mesh(1, 4, 1, devices=jax.devices()[:4]),
    )
    rows, length = 4, 17
    shapes = {
        "image": ((32, 32, 3), jnp.uint8),
        "image_size": ((2,), jnp.int32),
        "ids": ((length,), jnp.int32),
        "answer": ((length,), jnp.bool_),
    }
    batch = {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    program = step.lower(batch).compile().as_text()
    collectives = re.findall(r"= (.*?) (all-reduce|all-gather)(?:-start)?\(", program)
    assert any(kind == "all-gather" and "f32[128,256]" in what for what, kind in collectives)
    summed = [what for what, kind in collectives if kind == "all-reduce" and f"[{rows},{length}" in what]
    assert not summed, summed


def test_a_table_is_text_and_back():
    rules = (("a", P()), ("b", P(None, ("data", "fsdp"), "model")), ("c$", P("fsdp")), ("", LargestDim("model", 7)))
    texts = (("a", "whole"), ("b", "-,data+fsdp,model"), ("c$", "fsdp"), ("", "largest:model:7"))
    assert format_rules(rules) == texts and parse_rules(texts) == rules
    assert parse_rules(format_rules(DEFAULT_RULES)) == DEFAULT_RULES


@pytest.mark.parametrize("rule", [("(", "whole"), ("a", "pipe"), ("a", "largest:fsdp"), ("a", ""), ("a", None)])
def test_what_is_no_rule_is_named(rule):
    with pytest.raises(ValueError, match=r"rules\[1\] is .*; expected a pattern and 'whole', axes such as"):
        parse_rules([("a", "whole"), rule])
