"""The judge of the reference model, judged: closed forms, and drawers whose quality is known."""

from __future__ import annotations

import data
import evaluate
import numpy as np
import pytest


def perfect(words: list[str], seeds: list[int]) -> np.ndarray:
    tiles, names = data.load()
    index = {group[0]: i for i, group in enumerate(names)}
    return tiles[[index[word] for word in words]].transpose(0, 3, 1, 2) / np.float32(255)


def noisy(words: list[str], seeds: list[int]) -> np.ndarray:
    noise = np.stack([np.random.default_rng(seed).standard_normal((3, 32, 32)) for seed in seeds])
    return (perfect(words, seeds) + 0.05 * noise).clip(0, 1)


def shrink(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), 3, 8, 4, 8, 4).mean((3, 5))


def test_the_data_set() -> None:
    tiles, names = data.load()
    assert tiles.shape == (1636, 32, 32, 3)
    assert len({group[0] for group in names}) == len(names) == 1636
    # Every emoji has white around it somewhere, and none is blank.
    assert (tiles == 255).all(-1).any((1, 2)).mean() > 0.9
    assert (tiles.reshape(1636, -1).std(1) > 5).all()


def test_perfect_pictures_are_found_and_wrong_ones_are_not() -> None:
    right, words = data.prompts(64)
    first, five = evaluate.retrieval(perfect(words, []), right)
    assert first.all()
    assert five.all()
    first, five = evaluate.retrieval(perfect(words, []), right[1:] + right[:1])
    assert not first.any()


def test_frechet_of_two_gaussians_is_the_closed_form() -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal((200_000, 3)) * [1, 2, 3]
    other = random.standard_normal((200_000, 3)) * [2, 2, 1] + [1, 0, 0]
    # Diagonal covariances: |difference of means|^2 + sum of (difference of deviations)^2.
    assert evaluate.frechet(one, other) == pytest.approx(1 + 1 + 0 + 4, rel=0.02)
    assert evaluate.frechet(one, one) == pytest.approx(0, abs=1e-6)


def test_the_judge_ranks_models() -> None:
    good, images = evaluate.judge(evaluate.Model(noisy, shrink), 96)
    assert images.shape == (96, 3, 32, 32)
    assert good["top1"] == 1
    black = evaluate.Model(lambda words, seeds: np.zeros((len(words), 3, 32, 32), np.float32), shrink)
    bad, _ = evaluate.judge(black, 96, against=evaluate.Model(perfect, shrink))
    assert bad["top5"] < 0.1
    assert good["frechet_to_data"] < 0.1 * bad["frechet_to_data"]
    assert bad["psnr_median_db"] < 10
