import numpy as np
import pytest

from esg_jax.viz import GridRow, comparison_grid, image_grid, overlay, prediction_grid
from esg_jax.viz.grid import matches
from esg_jax.viz.overlay import outline
from esg_jax.viz.palette import assign_colors, neighbours, palette
from esg_jax.viz.text import fit_text, tag_box, text_size


@pytest.fixture
def mosaic():
    """A 6 x 8 mosaic of labels 1..48 and a grey photograph."""
    label_map = np.kron(np.arange(1, 49).reshape(6, 8), np.ones((40, 50), int))
    return np.full((*label_map.shape, 3), 128, np.uint8), label_map


def color_distance(first, second):
    """Rough visual distance of RGB colours, 0..1."""
    return np.linalg.norm((first.astype(float) - second) / 255) / np.sqrt(3)


def test_palette_is_distinct():
    colors = palette()
    assert colors.shape == (30, 3)
    distances = [color_distance(a, b) for i, a in enumerate(colors) for b in colors[:i]]
    assert min(distances) > 0.04


def test_neighbours_contrast(mosaic):
    _, label_map = mosaic
    touching = neighbours(label_map, 48)
    assert touching[0, 1] and touching[0, 8] and not touching[0, 2] and not touching[0, 0]
    colors = palette()[assign_colors(label_map, 48)]
    contrast = [color_distance(colors[a], colors[b]) for a, b in np.argwhere(touching)]
    assert min(contrast) > 0.15
    assert len(np.unique(colors, axis=0)) > 15


def test_fixed_colors_are_kept(mosaic):
    _, label_map = mosaic
    colors = assign_colors(label_map, 48, {3: 7, 4: 7})
    assert colors[3] == colors[4] == 7


def test_overlay_tints_outlines_and_tags(mosaic):
    image, label_map = mosaic
    plain = overlay(image, label_map, max_side=400)
    assert plain.shape == (240, 400, 3) and plain.dtype == np.uint8
    inside = plain[20, 25].astype(int)
    expected = (image[0, 0] + palette()[assign_colors(label_map, 48)[0]].astype(int)) / 2
    assert np.abs(inside - expected).max() <= 1
    assert plain[40, 25].min() > 180  # the line between two labels
    tagged = overlay(image, label_map, ["0.5"] * 48, max_side=400)
    changed = np.any(tagged != plain, axis=-1)
    assert changed.any() and not changed[outline(label_map)].any()  # tags stay inside their entity


def test_tags_that_do_not_fit_are_left_out(mosaic):
    image, label_map = mosaic
    long = overlay(image, label_map, ["a very long name indeed"] * 48, max_side=400)
    np.testing.assert_array_equal(long, overlay(image, label_map, max_side=400))


@pytest.mark.parametrize(("shape", "expected"), [((1, 1), (2, 2)), ((3000, 100), (1600, 53)), ((426, 640), (532, 800))])
def test_overlay_size(shape, expected):
    picture = overlay(np.zeros((*shape, 3), np.uint8), np.zeros(shape, int))
    assert picture.shape[:2] == expected


def test_overlay_refuses_mismatches(mosaic):
    image, label_map = mosaic
    with pytest.raises(ValueError, match="differ in size"):
        overlay(image[:-1], label_map)
    with pytest.raises(ValueError, match="3 tags for 48 entities"):
        overlay(image, label_map, ["a"] * 3)


def test_text_is_fitted_and_stays_inside():
    assert fit_text("short", 12, 500) == "short"
    fitted = fit_text("a long file name.jpg", 12, 60)
    assert fitted.endswith("…") and text_size(fitted, 12)[0] <= 60
    x0, y0, x1, y1 = tag_box((2, 99), "0.73", 12, (100, 100))
    assert x0 == 0 and y1 == 100 and x1 > x0 and y1 > y0


def test_image_grid_layout():
    red, tall = np.full((50, 100, 3), (255, 0, 0), np.uint8), np.zeros((200, 100, 3), np.uint8)
    page = image_grid([[red, None], [red, tall]], column_titles=["a", "b"], cell_width=100, gap=10)
    assert page.shape[1] == 230
    assert (page == (255, 0, 0)).all(-1).sum() == 2 * 50 * 100
    with pytest.raises(ValueError, match="equal, positive length"):
        image_grid([[red], [red, tall]])
    with pytest.raises(ValueError, match="1 column titles for 2"):
        image_grid([[red, tall]], column_titles=["a"])
    with pytest.raises(ValueError, match="equal, positive length"):
        image_grid([])


def test_prediction_grid_gives_matches_the_same_color():
    target = np.ones((60, 90), int)
    target[:, 30:] = 2
    target[:, 60:] = 3
    prediction = np.where(target == 3, 1, np.where(target == 1, 2, 0))
    assert matches(prediction, target) == {0: 2, 1: 0}
    row = GridRow(np.full((60, 90, 3), 100, np.uint8), prediction, target, "photo.jpg", [0.7, 0.6])
    page = prediction_grid([row], cell_width=90)
    # Columns: image, ground truth, prediction, 14 pixels apart.
    y = page.shape[0] // 2
    first, second = 14 + 104, 14 + 2 * 104
    np.testing.assert_array_equal(page[y - 15, first + 80], page[y - 15, second + 80])
    np.testing.assert_array_equal(page[y - 15, first + 8], page[y - 15, second + 8])
    assert np.any(page[y - 15, first + 45] != page[y - 15, second + 45])  # nothing was predicted in the middle


def test_prediction_grid_without_ground_truth_or_entities():
    image, nothing = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), int)
    page = prediction_grid([GridRow(image, nothing)], cell_width=100)
    assert page.shape[1] == 2 * 100 + 3 * 14
    assert prediction_grid([GridRow(image, nothing, nothing)], cell_width=100).shape[1] == 3 * 100 + 4 * 14
    with pytest.raises(ValueError, match="at least one row"):
        prediction_grid([])


def test_comparison_grid_shows_what_each_model_found():
    target = np.zeros((60, 90), int)
    target[:, :45], target[:, 45:] = 1, 2
    image = np.full((60, 90, 3), 100, np.uint8)
    before = GridRow(image, np.where(target == 1, 1, 0), target)
    after = GridRow(image, target[:, ::-1], target)  # both halves, numbered the other way round
    page = comparison_grid({"before": [before], "after": [after]}, cell_width=90)
    assert page.shape[1] == 4 * 90 + 5 * 14
    np.testing.assert_array_equal(page, comparison_grid({"before": [before], "after": iter([after])}, cell_width=90))
    y, left, right = page.shape[0] // 2 - 15, 8, 80
    truth, first, second = (page[y, 14 + column * 104 :] for column in (1, 2, 3))
    np.testing.assert_array_equal(first[left], truth[left])
    assert np.any(first[right] != truth[right])
    for x in (left, right):
        np.testing.assert_array_equal(second[x], truth[x])
    with pytest.raises(ValueError, match=r"different numbers of rows: \[1, 2\]"):
        comparison_grid({"before": [before], "after": [after, after]})
