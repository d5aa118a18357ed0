"""The measures against closed forms and against an independent implementation written with torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtimes.accuracy import EXACT_DB, compare, psnr, ssim

RANDOM = np.random.default_rng(0)


def test_sqnr_of_a_known_error() -> None:
    signal = RANDOM.standard_normal((3, 4, 5))
    agreement = compare(signal, signal * 1.01)
    assert agreement.sqnr_db == pytest.approx(40)
    assert agreement.relative == pytest.approx(0.01)
    assert agreement.max_abs == pytest.approx(0.01 * np.abs(signal).max())


def test_equal_zero_and_broken_arrays() -> None:
    ones = np.ones(4, np.float32)
    assert compare(ones, ones).sqnr_db == EXACT_DB
    assert compare(np.zeros(4), ones).sqnr_db == -EXACT_DB
    for broken in (np.array([1, 1, 1, np.nan]), np.array([1, 1, 1, np.inf]), np.ones(3)):
        assert not compare(ones, broken).finite
        assert compare(ones, broken).sqnr_db == -EXACT_DB


def test_psnr_closed_form() -> None:
    image = RANDOM.random((1, 3, 8, 8))
    assert psnr(image, image + 0.1) == pytest.approx(20)
    assert psnr(image * 255, image * 255 + 25.5, peak=255) == pytest.approx(20)
    assert psnr(image, image) == EXACT_DB
    assert psnr(image, image * np.nan) == -EXACT_DB


def test_ssim_against_torch_windows() -> None:
    x, y = RANDOM.random((2, 3, 20, 24)), RANDOM.random((2, 3, 20, 24))
    y = 0.7 * x + 0.3 * y
    a, b = (torch.nn.functional.unfold(torch.from_numpy(v).reshape(6, 1, 20, 24), 7) for v in (x, y))
    cov = ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).sum(1) / 48
    top = (2 * a.mean(1) * b.mean(1) + 1e-4) * (2 * cov + 9e-4)
    bottom = (a.mean(1) ** 2 + b.mean(1) ** 2 + 1e-4) * (a.var(1) + b.var(1) + 9e-4)
    assert ssim(x, y) == pytest.approx(float((top / bottom).mean()))
    assert ssim(x, x) == pytest.approx(1)
