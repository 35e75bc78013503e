"""Noise has the claimed scale and tails, draws the claimed rate, and no seed fixes either."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from fedlora.common.errors import BadInput
from fedlora.common.privacy.randomness import (
    OsRandom,
    Random,
    SeededRandom,
    Words,
    bernoulli,
    gaussian,
    uniform53,
)

SOURCES: list[Random] = [OsRandom(), SeededRandom(3, "test")]
LARGE = 20_000  # words: beyond what comes straight from the system call


class FixedWords:
    """Answers with the words it was given."""

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def words(self, n: int) -> Words:
        head, self._words = self._words[:n], self._words[n:]
        assert len(head) == n
        return head


def is_normal(sample: npt.NDArray[np.float64], std: float) -> bool:
    """Within 1 % of the claimed scale, centred, and of the right shape.

    Wrong alarm below one in a million.
    """
    right_scale = abs(float(sample.std()) / std - 1) < 0.01
    centred = abs(float(sample.mean())) < 6 * std / np.sqrt(len(sample))
    return (
        right_scale and centred and bool(stats.kstest(sample[:100_000] / std, "norm").pvalue > 1e-7)
    )


@pytest.mark.parametrize("source", SOURCES, ids=["os", "seeded"])
def test_noise_has_the_claimed_scale_and_no_other(source: Random) -> None:
    sample = gaussian(source, 1_000_000, 2.5)
    assert is_normal(sample, 2.5)
    assert not is_normal(sample, 2.5 * 2 / 3)
    assert not is_normal(sample, 2.5 * 3 / 2)


def test_neighbouring_noise_is_uncorrelated() -> None:
    sample = gaussian(OsRandom(), 1_000_000, 1.0)
    half = len(sample) // 2
    for shifted in (
        sample[:-1] * sample[1:],
        sample[:half] * sample[half:],
        sample[:-1] ** 2 * sample[1:],
    ):
        assert abs(float(shifted.mean())) < 6 * float(shifted.std()) / np.sqrt(len(shifted))


def test_tails_reach_beyond_six_standard_deviations() -> None:
    smallest = FixedWords(0, 2**64 - 1)  # u = (2⁻⁵³, 1): the longest radius, along the first axis
    assert gaussian(smallest, 2, 1.0)[0] == pytest.approx(np.sqrt(2 * 53 * np.log(2)))  # 8.57
    beyond_six = FixedWords(2**11 * 2**26, 2**63)  # u = 2⁻²⁷, an angle of π
    assert gaussian(beyond_six, 1, 1.0)[0] < -6
    # where it is rare but not too rare, the tail has the right weight
    sample = np.abs(gaussian(OsRandom(), 4_000_000, 1.0))
    assert stats.binomtest(int((sample > 4).sum()), len(sample), 2 * stats.norm.sf(4)).pvalue > 1e-7


def test_uniforms_use_53_bits_and_leave_zero_out() -> None:
    ends = uniform53(FixedWords(0, 2**11 - 1, 2**11, 2**64 - 1), 4)
    np.testing.assert_array_equal(ends, [2.0**-53, 2.0**-53, 2.0**-52, 1.0])
    assert stats.kstest(uniform53(OsRandom(), 100_000), "uniform").pvalue > 1e-7


@pytest.mark.parametrize("source", SOURCES, ids=["os", "seeded"])
@pytest.mark.parametrize("rate", [0.003, 0.2, 0.97])
def test_inclusion_is_binomial(source: Random, rate: float) -> None:
    units, steps = 5000, 400
    drawn = np.stack([bernoulli(source, units, rate) for _ in range(steps)])
    assert stats.binomtest(int(drawn.sum()), drawn.size, rate).pvalue > 1e-7
    # by unit, and by step
    for counts, trials in ((drawn.sum(axis=0), steps), (drawn.sum(axis=1), units)):
        dispersion = ((counts - trials * rate) ** 2 / (trials * rate * (1 - rate))).sum()
        assert 1e-7 < stats.chi2.sf(dispersion, len(counts)) < 1 - 1e-7
    both = drawn[:-1] & drawn[1:]  # independent from step to step
    assert stats.binomtest(int(both[::2].sum()), both[::2].size, rate**2).pvalue > 1e-7


def test_a_draw_is_exact_at_the_ends_and_never_above_its_rate() -> None:
    assert not bernoulli(FixedWords(0, 0), 2, 0.0).any()
    assert bernoulli(FixedWords(), 3, 1.0).all()
    assert bernoulli(FixedWords(2**62 - 1, 2**62), 2, 0.25).tolist() == [True, False]
    assert not bernoulli(FixedWords(0), 1, 2.0**-65).any()
    below_one = 1 - 2.0**-53
    assert bernoulli(FixedWords(2**64 - 2**11 - 1, 2**64 - 2**11), 2, below_one).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("rate", [-0.1, 1.0000001, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(BadInput, match="sampling rate"):
        bernoulli(OsRandom(), 3, rate)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(std: float) -> None:
    with pytest.raises(BadInput, match="standard deviation"):
        gaussian(OsRandom(), 3, std)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 4096, 4097, 2**19 + 1])
def test_any_length(n: int) -> None:
    for source in SOURCES:
        assert (
            source.words(n).shape
            == gaussian(source, n, 1.0).shape
            == bernoulli(source, n, 0.5).shape
            == (n,)
        )
    assert len(np.unique(gaussian(OsRandom(), n, 1.0))) == n
    with pytest.raises(BadInput, match="at least 0"):
        OsRandom().words(-1)


def test_words_never_repeat_over_calls_objects_and_restarts() -> None:
    program = (
        "from fedlora.common.privacy.randomness import OsRandom; import sys;"
        " sys.stdout.buffer.write(OsRandom().words(1000).tobytes() +"
        f" OsRandom().words({LARGE}).tobytes())"
    )
    seen = [OsRandom().words(n) for n in (1000, LARGE, 1000, LARGE)]
    for _ in range(2):
        output = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True
        ).stdout
        seen.append(np.frombuffer(output, dtype=np.uint64))
    words = np.concatenate(seen)
    assert len(words) == 2 * (1000 + LARGE) * 2
    assert len(np.unique(words)) == len(words)


@pytest.mark.parametrize("n", [100, LARGE])
def test_no_global_seed_fixes_noise_or_draws(n: int) -> None:
    noise, draws = [], []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        noise.append(gaussian(OsRandom(), n, 1.0))
        draws.append(bernoulli(OsRandom(), n, 0.5))
    assert not np.isin(noise[0], noise[1]).any()
    assert (draws[0] != draws[1]).any()


def test_drawing_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)
    gaussian(OsRandom(), LARGE, 1.0)
    gaussian(SeededRandom(1), LARGE, 1.0)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_equal(before[1], np.random.get_state(legacy=False))


def test_a_seeded_stream_is_its_path() -> None:
    def first(*path: int | str) -> int:
        return int(SeededRandom(7, *path).words(1)[0])

    # a changed stream would change old experiments
    assert first("a", 1) == first("a", 1) == 10311243398274889501
    paths: list[tuple[int | str, ...]] = [
        (),
        ("a",),
        ("b",),
        ("a", "b"),
        ("ab",),
        (1,),
        ("1",),
        (1, 1),
        (11,),
    ]
    assert len({first(*path) for path in paths}) == len(paths)
    stream = SeededRandom(7, "a", 1)
    assert not np.isin(stream.words(1000), stream.words(1000)).any()
