"""Tests of the principal components that colour patches, against scikit-learn and on planted features."""

import numpy as np
import pytest

from service.vision.pca import colour_range, fit_pca, project, reference_direction, to_colours

RNG = np.random.default_rng(4)


def features(count: int, width: int = 24) -> np.ndarray:
    return (RNG.normal(size=(count, width)) * np.linspace(3, 1, width) + 5).astype(np.float32)


@pytest.mark.parametrize(("counts", "width"), [([200], 24), ([30, 50, 7], 24), ([10], 24), ([40], 3)])
def test_components_are_scikit_learns(counts: list[int], width: int) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="pip install '.[reference]'")
    groups = [features(count, width) for count in counts]
    together = np.concatenate(groups)
    theirs = decomposition.PCA(3, svd_solver="full").fit(together.astype(np.float64))
    ours = fit_pca(groups)
    signs = np.sign((theirs.components_ * ours.components).sum(1))
    np.testing.assert_allclose(ours.mean, theirs.mean_, atol=1e-12)
    np.testing.assert_allclose(ours.components * signs[:, None], theirs.components_, atol=1e-7)
    coordinates = theirs.transform(together) * signs
    np.testing.assert_allclose(project(together, ours), coordinates, atol=1e-4)


def test_the_sign_depends_on_the_component_alone() -> None:
    rows = features(80)
    pca = fit_pca([rows])
    assert (pca.components @ reference_direction(24) > 0).all()
    mirrored = fit_pca([(2 * pca.mean - rows).astype(np.float32)])  # every projection changes its sign
    np.testing.assert_allclose(mirrored.components, pca.components, atol=1e-5)
    noisy = fit_pca([rows * (1 + 1e-3 * RNG.normal(size=rows.shape)).astype(np.float32)])
    assert (np.sum(noisy.components * pca.components, axis=1) > 0.99).all()


def test_the_reference_direction_never_changes() -> None:
    """A change of these numbers would invert the colours of pictures that users have already seen."""
    assert reference_direction(4).tolist() == pytest.approx([0.2360679775, -0.5278640450, 0.7082039325, -0.0557280900])
    np.testing.assert_array_equal(reference_direction(7), reference_direction(9)[:7])


def test_equal_patches_have_no_components() -> None:
    rows = np.full((50, 24), 3, np.float32)
    for same in (rows, rows * (1 + 1e-7 * RNG.normal(size=rows.shape)).astype(np.float32), rows[:1], 0 * rows):
        pca = fit_pca([same])
        assert not pca.components.any()
        coordinates = project(same, pca)
        np.testing.assert_array_equal(to_colours(coordinates, colour_range(coordinates)), 0.5)


def test_two_kinds_of_patches_have_one_component() -> None:
    rows = np.repeat(features(2), 30, axis=0)
    pca = fit_pca([rows])
    assert pca.components.any(axis=1).tolist() == [True, False, False]
    assert len(np.unique(project(rows, pca)[:, 0])) == 2


def test_colours_ignore_outliers() -> None:
    values = np.linspace(0, 1, 1001, dtype=np.float32)[:, None].repeat(3, axis=1)
    values[:5], values[-5:] = -1e6, 1e6
    low, high = limits = colour_range(values)
    assert low.tolist() == pytest.approx([0.01] * 3)
    assert high.tolist() == pytest.approx([0.99] * 3)
    colours = to_colours(values, limits)
    assert (colours.min(), colours.max()) == (0, 1)
    assert colours[500] == pytest.approx([0.5] * 3, abs=1e-5)
    np.testing.assert_array_equal(colours[:10], 0)
    np.testing.assert_array_equal(colours[-10:], 1)


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        fit_pca([np.full((4, 6), np.nan, np.float32)])
    with pytest.raises(ValueError, match="at least one patch"):
        fit_pca([np.zeros((0, 6), np.float32)])
