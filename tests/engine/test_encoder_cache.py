"""The encoder cache: bounded in bytes, pins respected, least recently used first, against a list model."""

import random

import pytest

from qvl.engine.encoder_cache import EncoderCache


def fill(cache: EncoderCache[str], name: str, num_bytes: int, holder: str = "x") -> bool:
    if not cache.reserve(name.encode(), num_bytes, holder):
        return False
    cache.put(name.encode(), name)
    return True


def test_reserved_counts_at_once_and_answers_only_when_filled() -> None:
    cache: EncoderCache[str] = EncoderCache(100)
    assert cache.reserve(b"a", 60, "x")
    assert b"a" in cache
    assert cache.used_bytes == 60
    assert not cache.is_filled(b"a")
    with pytest.raises(KeyError):
        cache.get(b"a")
    cache.put(b"a", "A")
    assert cache.get(b"a") == "A"


def test_least_recently_used_goes_first_and_pinned_ones_stay() -> None:
    cache: EncoderCache[str] = EncoderCache(100)
    for name in "abc":
        assert fill(cache, name, 30)
        cache.unpin(name.encode(), "x")
    cache.pin(b"a", "y")  # a was used just now, and is held
    cache.unpin(b"a", "y")
    assert fill(cache, "d", 30)
    assert [name for name in "abcd" if name.encode() in cache] == ["a", "c", "d"]
    assert fill(cache, "e", 70)  # d is pinned, so everything else goes
    assert [name for name in "abcde" if name.encode() in cache] == ["d", "e"]
    assert not fill(cache, "f", 1)
    cache.check_integrity()


def test_one_entry_larger_than_the_cache_is_held_alone_and_not_kept() -> None:
    cache: EncoderCache[str] = EncoderCache(100)
    assert fill(cache, "small", 10)
    assert not fill(cache, "large", 250, "y")
    cache.unpin(b"small", "x")
    assert fill(cache, "large", 250, "y")
    assert not fill(cache, "other", 1, "z")
    cache.check_integrity()
    cache.unpin(b"large", "y")
    assert cache.used_bytes == 0


def test_two_holders_of_one_picture() -> None:
    cache: EncoderCache[str] = EncoderCache(10)
    assert fill(cache, "a", 10, "x")
    cache.pin(b"a", "y")
    cache.unpin(b"a", "x")
    assert not fill(cache, "b", 1, "z")
    cache.unpin(b"a", "y")
    cache.unpin(b"a", "y")  # once more does no harm
    assert fill(cache, "b", 1, "z")
    assert b"a" not in cache


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_stay_within_bounds(seed: int) -> None:
    rng = random.Random(seed)
    cache: EncoderCache[str] = EncoderCache(100)
    pins: set[tuple[bytes, int]] = set()
    for _ in range(400):
        digest, holder = bytes([rng.randrange(12)]), rng.randrange(3)
        size = 5 + digest[0] * 9
        if rng.random() < 0.6:
            pinned = {d for d, _ in pins}
            if digest in cache:
                cache.pin(digest, holder)
                pins.add((digest, holder))
            else:
                fits = not pinned or sum(5 + d[0] * 9 for d in pinned) + size <= 100
                assert cache.reserve(digest, size, holder) == fits
                if fits:
                    cache.put(digest, "value")
                    pins.add((digest, holder))
        elif pins:
            digest, holder = rng.choice(sorted(pins))
            cache.unpin(digest, holder)
            pins.remove((digest, holder))
        cache.check_integrity()
        assert all(cache.is_filled(digest) for digest, _ in pins)
