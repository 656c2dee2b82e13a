"""The evaluation sets that a model of this package is run on; the argument names one.

    python eval.py --config=configs/recipes/sets.py:entityseg --checkpoint=cropformer_swin_t.safetensors --out=runs/ap_e
    python eval.py --config=configs/recipes/sets.py:coco_panoptic --checkpoint=mask2former.safetensors --out=runs/pq
    python eval.py --config=configs/recipes/sets.py:png --checkpoint=gella.safetensors --out=runs/png \\
        --config.input_masks=segmenter --config.segmenter=cropformer_swin_t.safetensors

The sets of text (`png`, `refcoco_*`, `grefcoco_*`, `reasonseg_*`) need GELLA's weights, which name categories, too:
`coco_panoptic`, `ade20k_panoptic` and the instance sets by the categories' names.
Folders are those of the official downloads below `datasets/`; others: --config.annotations=... --config.images=...
"""

from ml_collections import ConfigDict

from esg_jax.config import to_dict
from esg_jax.evaluation.tasks import (
    EntityTask,
    InstanceTask,
    NarrativeTask,
    PanopticTask,
    ReferringTask,
    SemanticTask,
)

_ENTITYSEG = "datasets/entityseg"
_LABELS = f"{_ENTITYSEG}/annotations"
_COCO = "datasets/coco"
_ADE = "datasets/ADEChallengeData2016"

SETS = {
    "entityseg_low": EntityTask(
        annotations=f"{_LABELS}/entity_segmentation/entityv2_010203_entity_val_lr.json",
        images=f"{_ENTITYSEG}/images_lr",
    ),
    "entityseg": EntityTask(
        annotations=f"{_LABELS}/entity_segmentation/entityv2_010203_entity_val.json",
        images=f"{_ENTITYSEG}/images",
    ),
    "entityseg_instance": InstanceTask(
        annotations=f"{_LABELS}/instance_segmentation/entityv2_01_instances_val.json",
        images=f"{_ENTITYSEG}/images/entity_01_11580",
    ),
    "entityseg_panoptic": PanopticTask(
        annotations=f"{_LABELS}/panoptic_segmentation/entityv2_01_panoptic_val.json",
        images=f"{_ENTITYSEG}/images/entity_01_11580",
        masks=f"{_LABELS}/panoptic_segmentation/panoptic_maps_val",
    ),
    "entityseg_semantic": SemanticTask(
        annotations=f"{_LABELS}/semantic_segmentation/val.txt",
        images=f"{_ENTITYSEG}/images_lr/entity_01_11580",
        masks=f"{_LABELS}/semantic_segmentation/semantic_maps_val",
        num_classes=150,
    ),
    "coco_instance": InstanceTask(annotations=f"{_COCO}/annotations/instances_val2017.json", images=f"{_COCO}/val2017"),
    "coco_panoptic": PanopticTask(annotations=f"{_COCO}/annotations/panoptic_val2017.json", images=f"{_COCO}/val2017"),
    "ade20k_panoptic": PanopticTask(
        annotations=f"{_ADE}/ade20k_panoptic_val.json",
        images=f"{_ADE}/images/validation",
    ),
    "ade20k_instance": InstanceTask(annotations=f"{_ADE}/ade20k_instance_val.json", images=f"{_ADE}/images/validation"),
    # Annotations written as class-agnostic COCO instances.
    "ade20k_entity": EntityTask(annotations=f"{_ADE}/ade20k_entity_val.json", images=f"{_ADE}/images/validation"),
    "uvo_frames": EntityTask(annotations="datasets/uvo/UVO_frame_val.json", images="datasets/uvo/frames"),
    "lvis": EntityTask(annotations="datasets/lvis/lvis_v1_val.json", images=_COCO),
    "ocid": EntityTask(annotations="datasets/ocid/entities.json", images="datasets/ocid"),
    "camo": EntityTask(annotations="datasets/camo/entities.json", images="datasets/camo"),
    "fss": EntityTask(annotations="datasets/fss/entities.json", images="datasets/fss"),
}

# Narratives of COCO val2017, grounded in its panoptic masks unless `input_masks` says otherwise.
SETS["png"] = NarrativeTask(
    reader="png",
    captions="datasets/png/png_coco_val2017.json",
    annotations=f"{_COCO}/annotations/panoptic_val2017.json",
    images=f"{_COCO}/val2017",
)
# Name of the set, its folder, its file, its splits; images are those of COCO train2014.
for _name, _folder, _file, _splits in (
    ("refcoco", "refcoco", "refs(unc).p", ("val", "testA", "testB")),
    ("refcoco+", "refcoco+", "refs(unc).p", ("val", "testA", "testB")),
    ("refcocog", "refcocog", "refs(umd).p", ("val", "test")),
    ("grefcoco", "grefs", "grefs(unc).json", ("val", "testA", "testB")),
):
    for _split in _splits:
        SETS[f"{_name}_{_split}"] = ReferringTask(
            reader="refcoco",
            captions=f"datasets/refer_seg/{_folder}/{_file}",
            images=f"{_COCO}/train2014",
            split=_split,
            # Every expression of the first three means one thing, so silence is never right.
            rules=() if _name == "grefcoco" else ("min_score=0.0",),
        )
# Only the answers are annotated here, so masks of everything must come from elsewhere.
for _split in ("val", "test"):
    SETS[f"reasonseg_{_split}"] = ReferringTask(
        reader="reasonseg", captions=f"datasets/reason_seg/{_split}", input_masks="segmenter"
    )


def get_config(name: str = "entityseg"):
    if name not in SETS:
        raise ValueError(f"unknown set {name!r}; choose one of {', '.join(SETS)}")
    return ConfigDict(to_dict(SETS[name]))
