"""Shape measures of figures whose values are known."""

import numpy as np
import pytest

from esg_jax.evaluation.metrics.images.annotation_statistics import AnnotationStatistics, perimeter, shape
from esg_jax.masks import rle


def encode(mask):
    return rle.encode(mask[None])[0]


def test_disc_is_convex_and_simple():
    y, x = np.mgrid[:201, :201]
    disc = (y - 100) ** 2 + (x - 100) ** 2 <= 80**2
    assert perimeter(disc) == pytest.approx(2 * np.pi * 80, rel=0.02)
    convexity, simplicity = shape(encode(disc))
    assert convexity == pytest.approx(1, abs=0.02) and simplicity == pytest.approx(1, abs=0.02)


def test_cross_is_neither():
    cross = np.zeros((90, 90), bool)
    cross[30:60], cross[:, 30:60] = True, True
    convexity, simplicity = shape(encode(cross))
    # Five of nine squares; the hull cuts half of each corner square off.
    assert convexity == pytest.approx(5 / 7)
    assert simplicity < 0.75


def test_image_numbers_and_merging():
    mask = np.zeros((10, 40), bool)
    mask[:5] = True
    whole, halves = AnnotationStatistics(), [AnnotationStatistics(), AnnotationStatistics()]
    for i in range(4):
        masks = np.stack([mask, ~mask])[: 1 + i % 2]
        for metric in (whole, halves[i // 2]):
            metric.add(i, {"masks": masks}, (10, 40))
    result = whole.result()
    assert result["ImageRes"] == pytest.approx(20)
    assert result["EntityNum"] == 1.5 and result["EntityNumMax"] == 2
    assert result["ValidArea"] == pytest.approx(0.75)
    assert halves[0].merge(halves[1]).result() == result
