"""Every published table that is a metric: data, command, and the number to expect.

    python -m configs.recipes.tables              # list
    python -m configs.recipes.tables esg_t4_ent   # one recipe in full

"ESG" is the entity segmentation and grounding paper, "GLEE" its companion's supplement. Published values are as
printed (x100). Nothing here has been reproduced with published weights; the arithmetic of every metric is checked
against its official evaluator (docs/evaluation.md). `$WEIGHTS` is a checkpoint, `$GT` the ground truth, `$PRED` saved
predictions of any model in the official format. GELLA grounds text in the masks of `$SEGMENTER`, a CropFormer.
"""

import dataclasses
import sys
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one number (or row) of a table is obtained.

    table: e.g. "ESG 4".
    row: the row of the table that `published` quotes.
    data: set and split.
    command: shell command, or several joined by " && ".
    published: metric -> printed value.
    note: what the paper leaves open, and what is done here.
    """

    table: str
    row: str
    data: str
    command: str
    published: dict[str, float]
    note: str = ""


def _model(name: str, extra: str = "") -> str:
    return f"python eval.py --config=configs/recipes/sets.py:{name} --checkpoint=$WEIGHTS --out=$OUT{extra}"


def _score(metric: str, extra: str = "") -> str:
    return f"esg evaluate {metric} --gt $GT --pred $PRED{extra}"


def _gella(name: str, extra: str = "") -> str:
    return _model(name, f"/{name} --config.input_masks=segmenter --config.segmenter=$SEGMENTER{extra}")


_PNG = "panoptic narrative grounding, val"
_PNG_NOTE = "Hard masks at full resolution; `--config.soft=True` gives the 2021 protocol of the PNGb and PPMN rows."
_RES_SPLITS = "refcoco {val,testA,testB}, refcoco+ {val,testA,testB}, refcocog UMD {val,test}; one item per sentence"

RECIPES: dict[str, Recipe] = {
    "esg_t1": Recipe(
        "ESG 1",
        "EntitySeg",
        "all annotations of EntitySeg (also COCO and ADE20K panoptic as COCO instances)",
        "esg evaluate statistics --gt $GT",
        {
            "ImageRes": 2700.7,
            "EntityNum": 18.1,
            "EntityNumMax": 236,
            "Convexity": 71.9,
            "Simplicity": 53.8,
            "ValidArea": 99.9,
        },
        "Shape measures are undefined in the paper; ours: esg_jax/evaluation/metrics/images/annotation_statistics.py.",
    ),
    "esg_t2": Recipe(
        "ESG 2",
        "ann2 against ann1",
        "500 doubly annotated EntitySeg images (not released)",
        _score("consistency"),
        {"mAP": 90.6, "ACC": 94.8},
        "Annotations have no scores: all 1.0, file order.",
    ),
    "esg_t4_sem": Recipe(
        "ESG 4", "SEM, Mask2Former Swin-L", "EntityClass semantic val", _model("entityseg_semantic"), {"mIoU": 50.5}
    ),
    "esg_t4_ins": Recipe(
        "ESG 4", "INS, Mask2Former Swin-L", "EntityClass instance val", _model("entityseg_instance"), {"AP": 30.3}
    ),
    "esg_t4_pan": Recipe(
        "ESG 4", "PAN, Mask2Former Swin-L", "EntityClass panoptic val", _model("entityseg_panoptic"), {"PQ": 13.4}
    ),
    "esg_t4_ent": Recipe(
        "ESG 4",
        "ENT, Mask2Former Swin-L",
        "EntitySeg val, full resolution",
        _model("entityseg", " --views=1"),
        {"AP": 46.2},
    ),
    "esg_t5_sem": Recipe(
        "ESG 5", "ADE20K, EntitySeg pretraining", "ADE20K val", _score("miou", " --num-classes 150"), {"mIoU": 57.2}
    ),
    "esg_t5_ins": Recipe("ESG 5", "ADE20K", "ADE20K instance val", _model("ade20k_instance"), {"AP": 36.0}),
    "esg_t5_pan": Recipe("ESG 5", "ADE20K", "ADE20K panoptic val", _model("ade20k_panoptic"), {"PQ": 49.0}),
    "esg_t5_ent": Recipe("ESG 5", "ADE20K", "ADE20K val as entities", _model("ade20k_entity"), {"AP": 40.6}),
    "esg_t5_ytvis": Recipe("ESG 5", "YVIS2019", "YouTube-VIS 2019 val (server)", _score("video-ap"), {"AP": 61.3}),
    "esg_t5_vipseg": Recipe(
        "ESG 5",
        "VIPSeg",
        "VIPSeg val, frames",
        _score("pq"),
        {"PQ": 37.0},
        "Frame PQ or VPQ is not stated; this is frame PQ.",
    ),
    "esg_t5_uvo": Recipe("ESG 5", "UVO", "UVO frames val", _model("uvo_frames"), {"AP": 29.5}),
    "esg_t6": Recipe(
        "ESG 6",
        "CropFormer Swin-T, low-resolution training",
        "EntitySeg val, full resolution",
        _model("entityseg", " --views=5"),
        {"AP": 41.0},
        "Mask2Former at (800, 1333): 39.5, with --views=1.",
    ),
    "esg_t7": Recipe(
        "ESG 7",
        "Ours (Mask2Former, EntitySeg then DIS5K)",
        "DIS5K; the test part is not stated",
        _score("dis"),
        {"maxF": 87.2, "wF": 78.9, "MAE": 3.5, "S": 89.6, "E_mean": 91.3, "HCE": 969},
    ),
    "esg_t8": Recipe(
        "ESG 8",
        "EntitySeg, ENT",
        "LVIS, OCID, CAMO, FSS as class-agnostic COCO instances",
        " && ".join(
            f"python eval.py --config=configs/recipes/sets.py:{name} --checkpoint=$WEIGHTS --out=$OUT/{name}"
            f" && esg evaluate entity-ap --gt $GT --pred $OUT/{name}/predictions.json --json $OUT/{label}.json"
            for name, label in (("lvis", "LVIS"), ("ocid", "OCID"), ("camo", "CAMO"), ("fss", "FSS"))
        )
        + " && esg evaluate average $OUT/LVIS.json $OUT/OCID.json $OUT/CAMO.json $OUT/FSS.json"
        " --key AR@100@IoU0.5 --set in-the-wild",
        {"LVIS": 33.56, "OCID": 76.63, "CAMO": 73.20, "FSS": 86.26, "average": 67.41},
        "Whether LVIS' federated gaps matter is not stated: plain class-agnostic recall.",
    ),
    "esg_t9": Recipe(
        "ESG 9",
        "GELLA-13B: refcoco val, refcoco+ val, refcocog val",
        _RES_SPLITS,
        " && ".join(_gella(f"{name}_val") for name in ("refcoco", "refcoco+", "refcocog")),
        {"refcoco_cIoU": 76.7, "refcoco+_cIoU": 67.0, "refcocog_cIoU": 70.4},
    ),
    "esg_t10": Recipe(
        "ESG 10",
        "GELLA-13B",
        _PNG,
        _gella("png"),
        {"AR": 71.3, "AR_Th": 67.8, "AR_St": 73.1, "AR_Sing": 71.0, "AR_Pl": 59.5},
        _PNG_NOTE,
    ),
    "esg_t12": Recipe(
        "ESG 12",
        "Ours",
        _PNG,
        _gella("png"),
        {"AR": 69.8},
        "The other columns are GFLOPs and seconds: a profiler's.",
    ),
    "esg_t13": Recipe(
        "ESG 13",
        "GELLA-13B, 50 epochs",
        "COCO panoptic val2017",
        _gella("coco_panoptic"),
        {"PQ": 56.5, "SQ": 83.3, "RQ": 67.3},
        "Mask2Former's row (53.4) is `eval.py --config=configs/recipes/sets.py:coco_panoptic`.",
    ),
    "esg_t13_ade": Recipe(
        "ESG 13",
        "GELLA-13B, 50 epochs",
        "ADE20K panoptic val, open vocabulary",
        _gella("ade20k_panoptic"),
        {"PQ": 21.1},
    ),
    "esg_t14_reason": Recipe(
        "ESG 14a",
        "GELLA",
        "ReasonSeg val",
        _gella("reasonseg_val"),
        {"gIoU": 66.7, "cIoU": 74.3},
        "Test: gIoU 63.3, cIoU 64.1.",
    ),
    "esg_t14_sginw": Recipe(
        "ESG 14b",
        "GELLA",
        "SGinW, 25 sets, files $OUT/<set>.json",
        "esg evaluate coco-ap --gt $GT --pred $PRED --json $OUT/Airplane-Parts.json"
        " && esg evaluate average $OUT/*.json --key AP --set sginw",
        {"average": 50.7},
        "The first command is repeated for every set.",
    ),
    "esg_t15": Recipe(
        "ESG 15", "336 pixels", "COCO panoptic val2017", _gella("coco_panoptic"), {"PQ": 53.1, "SQ": 83.3, "RQ": 63.8}
    ),
    "esg_t16": Recipe(
        "ESG 16",
        "MobileNetV2",
        "masks decoded from a colormap against the masks in it",
        _score("entity-ap"),
        {"AP": 95.2, "AP50": 96.9, "AP75": 96.1},
    ),
    "esg_t17": Recipe(
        "ESG 17", "all modules", "COCO panoptic val2017", _gella("coco_panoptic"), {"PQ": 53.1, "SQ": 83.3, "RQ": 63.8}
    ),
    "esg_t18": Recipe(
        "ESG 18",
        "test masks: ground truth",
        "COCO panoptic val2017",
        _model("coco_panoptic", " --config.input_masks=ground_truth"),
        {"PQ": 79.6, "SQ": 97.8, "RQ": 91.4},
    ),
    "esg_t19": Recipe("ESG 19", "ColorMap", _PNG, _gella("png"), {"AR": 69.8}, _PNG_NOTE),
    "esg_t20": Recipe("ESG 20", "ColorMap encoder", _PNG, _gella("png"), {"AR": 69.8}, _PNG_NOTE),
    "esg_t21": Recipe(
        "ESG 21",
        "0.2 / 0.2 / 0.6",
        _PNG,
        _gella("png") + " && " + _gella("png", " --config.phrases=generated").replace("$OUT/png", "$OUT/png_generated"),
        {"AR": 69.8, "AR_Th": 66.2, "AR_St": 72.3, "AR_Sing": 69.9, "AR_Pl": 58.4, "AR_text": 96.1},
        "AR_text is undefined in the paper; see esg_jax/evaluation/metrics/grounding/text_recall.py.",
    ),
    "esg_t22": Recipe(
        "ESG 22",
        "CropFormer Swin-L",
        _PNG,
        _gella("png"),
        {"AR": 69.8, "AR_Th": 66.2, "AR_St": 72.3, "AR_Sing": 69.9, "AR_Pl": 58.4},
        _PNG_NOTE,
    ),
    "esg_t23": Recipe("ESG 23", "FC", _PNG, _gella("png"), {"AR": 69.8, "AR_Th": 66.2, "AR_St": 72.3}, _PNG_NOTE),
    "glee_t4_ytvos": Recipe(
        "GLEE 4",
        "GLEE-Lite",
        "YouTube-VOS 2018 val (server; own split with annotations)",
        _score("jf", " --protocol youtube_vos --meta $META"),
        {"G": 80.4, "J_s": 80.2, "F_s": 85.5, "J_u": 74.3, "F_u": 81.4},
        "The server is closed; the aggregation is the published description.",
    ),
    "glee_t4_mose": Recipe(
        "GLEE 4",
        "GLEE-Lite",
        "MOSE val (server; own split with annotations)",
        _score("jf", " --protocol youtube_vos --meta $META"),
        {"JF": 56.1, "J": 51.8, "F": 60.4},
    ),
    "glee_t5_coco": Recipe(
        "GLEE 5", "CLIP-distillation", "COCO val2017", _score("coco-ap", " --kind bbox"), {"AP": 52.8}
    ),
    "glee_t5_refcoco": Recipe("GLEE 5", "CLIP-distillation", "RefCOCO val", _score("rec"), {"P@0.5": 84.5}),
    "glee_t5_odinw": Recipe(
        "GLEE 5",
        "CLIP-distillation",
        "ODinW, 13 sets, files $OUT/<set>.json",
        "esg evaluate coco-ap --kind bbox --gt $GT --pred $PRED --json $OUT/Aquarium.json"
        " && esg evaluate average $OUT/*.json --key AP --set odinw13",
        {"average": 41.5},
        "The first command is repeated for every set.",
    ),
    "glee_t5_tao": Recipe("GLEE 5", "CLIP-distillation", "TAO val", _score("teta"), {"TETA": 36.4}),
    "glee_t5_burst": Recipe(
        "GLEE 5",
        "CLIP-distillation",
        "BURST val",
        _score("hota"),
        {"HOTA": 24.9},
        "TrackEval compares boxes, not masks; `--overlap mask` does what the benchmark describes.",
    ),
    "glee_t5_ytvis": Recipe(
        "GLEE 5", "CLIP-distillation", "YouTube-VIS 2019 val (server)", _score("video-ap"), {"AP": 52.2}
    ),
    "glee_t5_ovis": Recipe("GLEE 5", "CLIP-distillation", "OVIS val (server)", _score("video-ap"), {"AP": 24.7}),
    "glee_t6": Recipe(
        "GLEE 6",
        "GLEE-Pro",
        "Ref-YouTube-VOS val (server), one folder per expression",
        _score("jf", " --protocol all_frames"),
        {"JF": 70.6, "J": 68.2, "F": 72.9},
    ),
    "glee_t7": Recipe(
        "GLEE 7",
        "GLEE-Pro, Point (ffn)",
        "COCO val2017 instances, one click each",
        _score("click"),
        {"mIoU_1click": 64.8},
        "Where the click lies is not stated: esg_jax.evaluation.metrics.grounding.click.click_point.",
    ),
    "glee_t8": Recipe(
        "GLEE 8",
        "GLEE-Pro-Scale",
        "ODinW, 13 sets, zero-shot, files $OUT/<set>.json",
        "esg evaluate coco-ap --kind bbox --gt $GT --pred $PRED --json $OUT/Aquarium.json"
        " && esg evaluate average $OUT/*.json --key AP --set odinw13",
        {"average": 53.4},
        "The first command is repeated for every set.",
    ),
    "glee_t9": Recipe(
        "GLEE 9",
        "GLEE-Pro, 10 shots",
        "ODinW, 13 sets, three seeds, files $OUT/seed<k>/<set>.json",
        "esg evaluate coco-ap --kind bbox --gt $GT --pred $PRED --json $OUT/seed0/Aquarium.json"
        " && esg evaluate average $OUT/seed*/*.json --key AP",
        {"Avg_mean": 65.6, "Avg_std": 0.4},
        "The divisor of the deviation is not stated: n; the result also has n - 1.",
    ),
}


def show(name: str) -> str:
    """A recipe as text."""
    recipe = RECIPES[name]
    values = ", ".join(f"{metric} {value}" for metric, value in recipe.published.items())
    lines = [
        f"{name}: table {recipe.table}, {recipe.row}",
        f"  data       {recipe.data}",
        *(f"  {'run       ' if i == 0 else '          '} {c}" for i, c in enumerate(recipe.command.split(" && "))),
        f"  published  {values}",
    ]
    return "\n".join(lines + ([f"  note       {recipe.note}"] if recipe.note else []))


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        print(f"error: unknown recipe {unknown[0]!r}; the names are: {', '.join(RECIPES)}", file=sys.stderr)
        return 1
    print("\n\n".join(show(name) for name in names or RECIPES))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
