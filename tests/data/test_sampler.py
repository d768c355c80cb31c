"""The order of training samples."""

import pytest

from core.errors import UserError
from data.sampler import MicroBatches, Position, Shuffled, ShuffledShards


def order(steps=range(6), rank=0, world_size=1, seed=0, micro=2, total=50, size=8, position=None):
    position = position or Position.after_steps(steps.start, size, max(total, size))
    sampler = MicroBatches(
        Shuffled(total, seed), size, micro, rank, world_size, position, len(steps)
    )
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_an_epoch_takes_every_sample_at_most_once():
    indices = [index for batch in order() for _, index in batch]
    assert len(set(indices)) == len(indices) == 48
    assert {epoch for batch in order() for epoch, _ in batch} == {0}
    later = order(range(6, 12))
    assert {epoch for batch in later for epoch, _ in batch} == {1}
    assert [i for b in later for _, i in b] != indices


def test_resuming_goes_on_where_it_stopped():
    assert order(range(20))[4 * 9 :] == order(range(9, 20))


def test_another_batch_goes_on_at_the_same_sample():
    """2 steps of 8 samples, then batches of 12: 16 ... 40, and what is left makes no third."""
    position = Position()
    for _ in range(2):
        position = position.after_batch(8, 50)
    assert position == Position(0, 16) == Position.after_steps(2, 8, 50)
    whole = [item for batch in order(range(6)) for item in batch]
    found = [i for b in order(range(3), size=12, position=position) for i in b]
    assert found[:24] == whole[16:40]
    assert {epoch for epoch, _ in found[24:]} == {1}
    assert Position(0, 48).of_batch(8, 50) == Position(1, 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_token_pools_do_not_depend_on_the_number_of_processes(world_size):
    parts = [order(rank=rank, world_size=world_size) for rank in range(world_size)]
    interleaved = [batch for row in zip(*parts, strict=True) for batch in row]
    assert interleaved == order()


def test_seeds_give_other_orders():
    assert order(seed=0) == order(seed=0)
    assert order(seed=0) != order(seed=1)


def test_a_data_set_smaller_than_a_batch_is_refused():
    with pytest.raises(UserError, match="8 is more than the 7 training images"):
        order(total=7)


def test_shards_are_shuffled_and_mixed_within_a_window():
    shards = [(10 * i, 10 * i + 10) for i in range(5)]
    order = ShuffledShards(shards, window=2, seed=3)
    assert len(order) == 50
    windows = set()
    for epoch in range(10):
        samples = order.epoch(epoch)
        assert sorted(samples.tolist()) == list(range(50))
        parts = [set((part // 10).tolist()) for part in samples.split(20)]
        assert [len(part) for part in parts] == [2, 2, 1]
        assert set((samples[:10] // 10).tolist()) == parts[0]  # mixed, not one after the other
        windows.add(tuple(map(frozenset, parts)))
    assert len(windows) > 3


def test_order_of_shards_is_a_function_of_seed_and_epoch():
    shards = [(0, 10), (10, 17), (17, 18)]
    first = ShuffledShards(shards, 2, seed=3).epoch(1).tolist()
    assert ShuffledShards(shards, 2, seed=3).epoch(1).tolist() == first
    assert sorted(first) == list(range(18))
    assert ShuffledShards(shards, 2, seed=3).epoch(2).tolist() != first
    assert ShuffledShards(shards, 2, seed=4).epoch(1).tolist() != first
