"""The judge of the reference model, judged: closed forms, and drawers whose quality is known."""

from __future__ import annotations

import data
import evaluate
import measures
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
    first, five = measures.retrieval(perfect(words, []), right)
    assert first.all()
    assert five.all()
    first, five = measures.retrieval(perfect(words, []), right[1:] + right[:1])
    assert not first.any()


def test_frechet_of_two_gaussians_is_the_closed_form() -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal((200_000, 3)) * [1, 2, 3]
    other = random.standard_normal((200_000, 3)) * [2, 2, 1] + [1, 0, 0]
    # Diagonal covariances: |difference of means|^2 + sum of (difference of deviations)^2.
    assert measures.frechet(one, other) == pytest.approx(1 + 1 + 0 + 4, rel=0.02)
    assert measures.frechet(one, one) == pytest.approx(0, abs=1e-6)


def test_bootstrap_intervals_are_the_closed_forms() -> None:
    """Of the mean, 1.96 standard errors; of a normal sample's median, 1.2533 times that (Kenney and Keeping 1962)."""
    values = np.random.default_rng(3).normal(5, 2, 4000)
    error = 1.96 * values.std() / len(values) ** 0.5
    low, high = measures.interval(values)
    assert (low, high) == (
        pytest.approx(values.mean() - error, abs=0.006),
        pytest.approx(values.mean() + error, abs=0.006),
    )
    low, high = measures.interval(values, np.median)
    assert high - low == pytest.approx(2 * 1.2533 * error, rel=0.15) and low < 5 < high
    assert measures.interval(np.full(50, 7.0), measures.lowest_tenth) == (7.0, 7.0)


def test_the_null_interval_is_what_seeds_explain_and_nothing_more() -> None:
    """Far from the data only the means count: the distance is |m|² and a swap of pair i moves it by 4·m·d_i/n."""
    random = np.random.default_rng(5)
    truth, base = random.standard_normal((400, 2)), np.array([30.0, 0.0])
    one, other = base + random.standard_normal((400, 2)), base + random.standard_normal((400, 2))
    low, high = measures.null_interval(one, other, truth)
    expected = 1.96 * 2 * 30 * np.square((one - other)[:, 0]).sum() ** 0.5 / 400
    assert (low, high) == (pytest.approx(-expected, rel=0.2), pytest.approx(expected, rel=0.2))
    data = measures.Gaussian(truth)
    assert low < data.distance(one) - data.distance(other) < high
    other[:, 0] += 1.0  # a model that draws otherwise, not only from other seeds
    low, high = measures.null_interval(one, other, truth)
    assert not low < data.distance(one) - data.distance(other) < high


def test_the_gate_lets_the_same_model_pass_and_names_what_a_damaged_one_misses() -> None:
    model = evaluate.Model(noisy, shrink)
    same, _ = evaluate.judge(model, 64, model)
    assert same["psnr_median_db"] == same["psnr_10th_percentile_95"][0] == 200
    assert same["top1_difference_95"] == [0, 0] and same["frechet_shift"] == 0
    assert measures.Gate().missed(same) == []

    def damaged(words: list[str], seeds: list[int]) -> np.ndarray:
        """Every third picture is another emoji, and all have more noise."""
        images = perfect(words, seeds)
        images[::3] = images[::-1][::3]
        noise = np.random.default_rng(9).standard_normal(images.shape)
        return (images + 0.2 * noise).clip(0, 1).astype(np.float32)

    found, _ = evaluate.judge(evaluate.Model(damaged, shrink), 64, model)
    low, high = found["psnr_median_95"]
    assert low <= found["psnr_median_db"] <= high < 20
    assert found["top1_difference"] < -0.2 and found["top1_difference_95"][1] < 0
    missed = measures.Gate().missed(found)
    assert [line.split(" ")[0] for line in missed] == ["median", "10th", "top-1", "Fréchet"]
    assert "top-1 falls by" in missed[2] and "at most 1.5 are allowed" in missed[2]
    lenient = measures.Gate(psnr=5, psnr_10th=1, top1_drop=100)
    assert [line.split(" ")[0] for line in lenient.missed(found)] == ["Fréchet"]
    broken = found | {"psnr_median_db": float("nan")}
    assert len(lenient.missed(broken)) == 2


def test_the_judge_ranks_models() -> None:
    good, images = evaluate.judge(evaluate.Model(noisy, shrink), 96)
    assert images.shape == (96, 3, 32, 32)
    assert good["top1"] == 1
    black = evaluate.Model(lambda words, seeds: np.zeros((len(words), 3, 32, 32), np.float32), shrink)
    bad, _ = evaluate.judge(black, 96, against=evaluate.Model(perfect, shrink))
    assert bad["top5"] < 0.1
    assert good["frechet_to_data"] < 0.1 * bad["frechet_to_data"]
    assert bad["psnr_median_db"] < 10
