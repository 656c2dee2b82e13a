import pytest

from data.licence_subset import attribution, keep_licences

COCO = [
    {
        "licenses": [{"id": n, "name": f"licence {n}", "url": f"http://l/{n}"} for n in range(1, 9)],
        "images": [{"id": 100 + n, "license": n, "flickr_url": f"http://f/{n}"} for n in range(1, 9)],
    }
]


def entities(source):
    images = [{"id": n, "file_name": f"{n}.jpg", "source": source, "source_id": 100 + n} for n in range(1, 10)]
    return {"images": images, "annotations": [{"id": n, "image_id": n} for n in range(1, 10)], "categories": []}


def test_only_redistributable_licences_stay():
    kept = keep_licences(entities("coco_panoptic"), COCO)
    assert [image["id"] for image in kept["images"]] == [4, 7, 8]
    assert [annotation["image_id"] for annotation in kept["annotations"]] == [4, 7, 8]
    assert [licence["id"] for licence in kept["licenses"]] == [4, 7, 8]
    assert attribution(kept).splitlines()[0] == "4.jpg: licence 4 (http://l/4), http://f/4"


def test_official_files_are_matched_by_image_id():
    content = {"images": [{"id": 104, "file_name": "x"}, {"id": 101, "file_name": "y"}], "annotations": []}
    assert [image["id"] for image in keep_licences(content, iter(COCO))["images"]] == [104]


def test_images_of_other_sources_never_pass():
    with pytest.raises(ValueError, match="no image has a licence"):
        keep_licences(entities("camvid"), COCO)


def test_captions_of_other_images_go():
    content = {**entities("coco_panoptic"), "captions": [{"id": n, "image_id": n} for n in range(1, 10)]}
    assert [caption["image_id"] for caption in keep_licences(content, COCO)["captions"]] == [4, 7, 8]
