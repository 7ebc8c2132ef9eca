"""Numbers keyed by sample: they are the published hash, look random in every direction, and know no batch."""

import itertools

import pytest
import torch

from training.randomness import DRAW_STEP, FORK_STEP, SampleRandom, _mix, _signed, sample_keys

WORD = 2**64


def mixed(word):
    """SplitMix64's finaliser in Python's own integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return word ^ word >> 31


def plain_key(seed, step, position):
    key = 0
    for word in (seed, step, position):
        key = mixed((key + (word + 1) * FORK_STEP) % WORD)
    return key


def plain_uniform(key, draw, element):
    state = mixed((key + (draw + 1) * DRAW_STEP) % WORD)
    return (mixed((state + (element + 1) * DRAW_STEP) % WORD) >> 40) / 2**24


def test_the_hash_is_splitmix64():
    # The first outputs of the published generator for the seed 1234567.
    states = [_signed(1234567 + i * 0x9E3779B97F4A7C15) for i in range(1, 4)]
    found = [word % WORD for word in _mix(torch.tensor(states)).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, 2**63 - 1])
def test_numbers_are_the_plain_definitions(seed):
    positions = [0, 1, 77, 10**6]
    keys = sample_keys(seed, 12, torch.tensor(positions))
    plain = [plain_key(seed, 12, position) for position in positions]
    assert [key % WORD for key in keys.tolist()] == plain
    drawn = SampleRandom(keys).uniform(5, (2, 3))
    assert drawn.dtype == torch.float32
    assert drawn.flatten(1).tolist() == [[plain_uniform(key, 5, e) for e in range(6)] for key in plain]
    assert SampleRandom(keys).uniform(5).tolist() == drawn[:, 0, 0].tolist()
    forks = [mixed((key + 4 * FORK_STEP) % WORD) for key in plain]
    assert [key % WORD for key in SampleRandom(keys).fork(3).keys.tolist()] == forks


def test_known_values_stay():
    # A change of these changes every crop of every run that goes on.
    drawn = SampleRandom(sample_keys(0, 0, torch.arange(2))).uniform(0, (2,))
    assert (drawn * 2**24).int().tolist() == [[2647649, 1968631], [12888996, 16039046]]


def test_views_are_forks_one_after_the_other():
    random = SampleRandom(sample_keys(3, 1, torch.arange(5)))
    assert torch.equal(random.views(4).keys, torch.cat([random.fork(view).keys for view in range(4)]))
    assert len(random.views(4)) == 20


def test_a_sample_has_its_numbers_in_any_batch():
    whole = SampleRandom(sample_keys(7, 3, torch.arange(64)))
    for part in torch.randperm(64, generator=torch.Generator().manual_seed(0)).split(13):
        random = SampleRandom(sample_keys(7, 3, part))
        assert torch.equal(random.uniform(2, (3,)), whole.uniform(2, (3,))[part])
        assert torch.equal(random.fork(1).uniform(0), whole.fork(1).uniform(0)[part])


def neighbours():
    """Numbers [m, k] whose rows differ in one thing only, neighbours in it side by side."""
    n = 20_000
    base = SampleRandom(sample_keys(0, 0, torch.arange(n)))
    yield "positions", base.uniform(0).view(-1, 2)
    yield "elements", base.uniform(0, (3,))
    yield "draws", torch.stack([base.uniform(draw) for draw in range(3)], dim=1)
    yield "forks", torch.stack([base.uniform(0), *(base.fork(purpose).uniform(0) for purpose in range(3))], dim=1)
    yield "grandchildren", torch.stack([base.fork(0).fork(1).uniform(0), base.fork(1).fork(0).uniform(0)], dim=1)
    for name, keys in (
        ("seeds", [sample_keys(seed, 0, torch.arange(n)) for seed in range(3)]),
        ("steps", [sample_keys(0, step, torch.arange(n)) for step in range(3)]),
        ("seed and step", [sample_keys(0, 1, torch.arange(n)), sample_keys(1, 0, torch.arange(n))]),
    ):
        yield name, torch.stack([SampleRandom(k).uniform(0) for k in keys], dim=1)
    # positions shifted by one: the step and the position must not add up
    shifted = [sample_keys(0, 0, torch.arange(1, n + 1)), sample_keys(0, 1, torch.arange(n))]
    yield "step against position", torch.stack([SampleRandom(k).uniform(0) for k in shifted], dim=1)


def chi_square(bins):
    """Of `bins` [m] in 0..99; 99 degrees of freedom: above 160 once in 10,000 times."""
    expected = len(bins) / 100
    return float(((torch.bincount(bins, minlength=100) - expected) ** 2 / expected).sum())


def test_numbers_are_uniform_and_neighbours_independent():
    for name, numbers in neighbours():
        n = len(numbers)
        assert numbers.min() >= 0, name
        assert numbers.max() < 1, name
        assert (numbers.mean(dim=0) - 0.5).abs().max() < 4.5 / (12 * n) ** 0.5, name
        assert (numbers.var(dim=0) - 1 / 12).abs().max() < 4.5 / (180 * n) ** 0.5, name
        for column in numbers.unbind(1):
            assert chi_square((column * 100).long()) < 160, name
        for a, b in itertools.combinations(numbers.unbind(1), 2):
            assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 4.5 / n**0.5, name
            assert chi_square((a * 10).long() * 10 + (b * 10).long()) < 160, name


def test_keys_do_not_collide():
    keys = torch.cat([sample_keys(seed, step, torch.arange(1000)) for seed in range(10) for step in range(10)])
    assert len(keys.unique()) == 100_000


def test_a_seed_beyond_64_bits_is_refused():
    with pytest.raises(ValueError, match=r"seed=9223372036854775808 must fit into 64 bits"):
        sample_keys(2**63, 0, torch.arange(1))
