"""GELLA: the nouns of a text grounded in entity masks; without language model its vision branch alone."""

import re

import jax
import jax.numpy as jnp

from esg_jax.models.gella import Gella, GellaConfig
from esg_jax.systems.system import System

# Where a MobileNetV2 may be, below `visual`.
_ENCODERS = ("image_encoder", "entity_encoder.colormap_encoder", "entity_encoder.mask_encoder")


class GellaSystem(System):
    """Checkpoints: `interop/families/gella.py`; `llava.py`, `llama.py` and `clip.py` there for its parts."""

    name = "GELLA"
    config = GellaConfig
    module = Gella
    grounds_text = True

    def data_configs(self):
        from esg_jax.input.grounding import GroundingDataConfig
        from esg_jax.input.pipeline import DataConfig

        return GroundingDataConfig, DataConfig

    def loss_config(self):
        from esg_jax.losses.gella import GellaLossConfig

        return GellaLossConfig

    def check(self, run):
        from esg_jax.input.grounding import GroundingDataConfig

        model, data = run.model, run.data
        with_text = isinstance(data, GroundingDataConfig)
        if with_text != (model.llm is not None):
            raise ValueError(
                "GELLA with a language model needs data of type GroundingDataConfig; without one (model.llm=None) it "
                "needs DataConfig with mapper 'colormap'"
            )
        if not with_text and data.mapper != "colormap":
            raise ValueError(f"data.mapper is {data.mapper!r}; GELLA without language model needs 'colormap'")
        wanted = {
            "image_size": model.image_size,
            "map_size": model.colormap.size,
            "max_entities": model.num_queries,
            "num_image_tokens": model.num_image_tokens,
            "pad_position": model.pad_position,
        }
        for name, value in wanted.items():
            if getattr(data, name, value) != value:
                raise ValueError(f"data.{name} is {getattr(data, name)}, but the model needs {value}")
        if model.llm is not None and not run.tokenizer:
            raise ValueError("config.tokenizer is empty; name a tokenizer file, or 'smollm2'")

    def batches(self, run, process_index, process_count):
        from esg_jax.input import grounding, pipeline

        if run.model.llm is None:
            return pipeline.train_iterator(run.data, process_index, process_count)
        return grounding.train_iterator(run.data, _tokenizer(run), process_index, process_count)

    def batch_shapes(self, run, height, width):
        data = run.data
        shapes = {
            "image": ((data.image_size, data.image_size, 3), jnp.uint8),
            "image_size": ((2,), jnp.int32),
            "label_map": ((data.map_size, data.map_size), jnp.int16),
            "map_size": ((2,), jnp.int32),
        }
        if run.model.llm is not None:
            shapes |= {
                "ids": ((max(data.lengths),), jnp.int32),
                "answer": ((max(data.lengths),), jnp.bool_),
                "seg_pos": ((data.max_phrases,), jnp.int32),
                "seg_valid": ((data.max_phrases,), jnp.bool_),
                "links": ((data.max_phrases, data.max_entities), jnp.bool_),
                "linked": ((data.max_phrases,), jnp.bool_),
            }
        return {name: jax.ShapeDtypeStruct((data.batch_size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def task(self, run):
        from esg_jax.train.tasks import GroundingTask

        return GroundingTask(run.loss, run.model.num_queries)

    def starting_names(self, weights):
        """A LLaVA brings its image encoder under another name."""
        return {re.sub(r"^vision\.", "visual.image_encoder.", name): value for name, value in weights.items()}

    def pretrained(self, run, shapes):
        from esg_jax.train.initial import backbone_weights

        weights = {}
        for prefix in (f"visual.{encoder}." for encoder in _ENCODERS):
            if run.backbone_weights and f"{prefix}stem.conv.kernel" in shapes:
                weights |= backbone_weights(run.backbone_weights, shapes, prefix)
        return weights | (_language_model(run.llm_weights) if run.llm_weights else {})

    def facts(self, run, trained):
        if run.model.llm is None:
            return {"inference": {}}
        wording = {name: getattr(run.data, name) for name in ("conversation", "prompts", "with_count")}
        facts = {"grounding": {"tokenizer": run.tokenizer, **wording}}
        return facts | ({"llm_weights": run.llm_weights} if self.left_out(run, trained) else {})

    def left_out(self, run, trained):
        """A frozen language model."""
        whole = run.llm_weights and not any(name.startswith("llm.") for name in trained)
        return r"^llm\." if whole else ""

    def given(self, facts):
        return _language_model(facts["llm_weights"]) if "llm_weights" in facts else {}

    def grounder(self, bundle, **options):
        from esg_jax.inference.grounding.grounder import Grounder

        return Grounder.from_bundle(bundle, **options)

    def reconstructor(self, bundle, **options):
        from esg_jax.inference.grounding.reconstruction import Reconstructor

        return Reconstructor(bundle.load_as(Gella), **options)


def _language_model(source):
    """Weights of a GGUF file, or of the packaged "smollm2"."""
    from esg_jax.interop.gguf import load_llama, packaged_smollm2
    from esg_jax.weights import named_arrays

    model = load_llama(packaged_smollm2() if source == "smollm2" else source)
    return {f"llm.{name}": value for name, value in named_arrays(model).items()}


def _tokenizer(run):
    """The tokenizer of a run.

    Raises:
        ValueError: its special tokens or their number are not the model's.
    """
    from esg_jax.interop.gguf import packaged_smollm2
    from esg_jax.text.tokenizers import open_tokenizer

    tokenizer = open_tokenizer(packaged_smollm2() if run.tokenizer == "smollm2" else run.tokenizer)
    wanted = {"image_id": tokenizer.image_id, "seg_id": tokenizer.seg_id}
    for name, value in wanted.items():
        if getattr(run.model, name) != value:
            raise ValueError(f"config.model.{name} is {getattr(run.model, name)}, but the tokenizer has {value}")
    if tokenizer.vocab_size > run.model.llm.vocab_size:
        raise ValueError(
            f"config.model.llm.vocab_size is {run.model.llm.vocab_size}, the tokenizer needs {tokenizer.vocab_size}"
        )
    return tokenizer
