"""The block pool: what is shared, what is copied, what is given back; every count worked out by hand."""

import gc

import pytest
import torch
from helpers import assert_nothing_leaked, full_logits, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from handloom import Engine
from handloom.cache.pool import RESERVED, TRASH, ZERO, BlockPool
from handloom.errors import HandloomError, PoolExhausted

BLOCK = 4


def pool_of(capacity=10, max_blocks=None, **options) -> BlockPool:
    """A pool of blocks of 4 cells, with one layer of one number per cell."""
    pool = BlockPool(BLOCK, capacity, max_blocks, **options)
    pool.add_store([0], (1, 1), (1, 1), torch.float32, "cpu")
    return pool


def write(pool, table, start, values):
    """Put numbers into cells `[start, ...)` of a sequence, as a forward pass does."""
    keys, _ = pool.layer(0)
    for at, value in enumerate(values, start=start):
        keys[table.blocks[at // BLOCK], at % BLOCK] = value


def read(pool, table, length):
    keys, _ = pool.layer(0)
    return [keys[table.blocks[at // BLOCK], at % BLOCK].item() for at in range(length)]


def grown(pool, table, length, values):
    """The table of a sequence of `length` cells after `values` more."""
    table = pool.writable(table, length, len(values))
    write(pool, table, length, values)
    return table


# One sequence


def test_a_sequence_takes_a_block_every_four_cells_and_gives_all_back():
    pool = pool_of()
    table = pool.table()
    for length in range(9):
        table = grown(pool, table, length, [length])
        assert pool.in_use == length // BLOCK + 1
        pool.check()
    assert read(pool, table, 9) == list(range(9))
    assert pool.copies == 0
    del table
    assert pool.in_use == 0
    pool.check()


def test_the_reserved_blocks_are_never_handed_out():
    pool = pool_of(capacity=6)
    table = pool.writable(pool.table(), 0, 40)
    assert not {TRASH, ZERO} & set(table.blocks)
    assert len(table) == 10
    pool.check()


def test_growth_keeps_what_was_written():
    pool = pool_of(capacity=3)
    table = grown(pool, pool.table(), 0, [1, 2, 3])
    grown_far = grown(pool, table, 3, list(range(4, 60)))
    assert read(pool, grown_far, 59) == list(range(1, 60))
    assert pool.capacity >= RESERVED + 15
    pool.check()


def test_scrubbed_blocks_come_out_clean():
    pool = pool_of(capacity=3, max_blocks=1, scrub=True)
    table = grown(pool, pool.table(), 0, [float("nan")] * 4)
    [block] = table.blocks
    del table
    again = pool.writable(pool.table(), 0, 1)
    assert again.blocks == (block,)
    pool.clean()  # as before every pass
    assert read(pool, again, 4) == [0, 0, 0, 0]


def test_what_is_filled_at_once_is_not_scrubbed_and_what_comes_later_is():
    pool = pool_of(capacity=12, max_blocks=6, scrub=True)
    nan = float("nan")
    table = grown(pool, pool.table(), 0, [nan] * 24)
    first = table.blocks[0]
    del table
    table = pool.writable(pool.table(), 0, 6)  # a whole block and a half
    longer = pool.further(table, 2)
    assert longer.blocks == tuple(range(first, first + 4))
    pool.clean()
    seen = [value != value for value in read(pool, longer, 16)]
    assert seen == [True] * 4 + [False] * 12


# Sharing and copying


def test_of_three_forks_inside_a_block_one_writes_in_place_and_two_copy():
    pool = pool_of()
    parent = grown(pool, pool.table(), 0, [1, 2, 3, 4, 5])  # one full block and one cell
    assert pool.in_use == 2
    forks = [grown(pool, parent, 5, [60 + i]) for i in range(3)]
    assert pool.copies == 2
    assert pool.in_use == 4  # the full block once, three tails
    assert [read(pool, fork, 6) for fork in forks] == [[1, 2, 3, 4, 5, 60 + i] for i in range(3)]
    assert read(pool, parent, 5) == [1, 2, 3, 4, 5]
    assert len({fork.blocks[0] for fork in forks}) == 1
    pool.check()


@pytest.mark.parametrize("change", ["fork", "rewind", "grow"])
def test_what_a_row_changes_costs_the_same_however_many_layers_there_are(change):
    """Layers of one kind lie in one tensor, so that a copied or added block is no loop over them."""
    names = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names[-1].append(func.__name__)
            return func(*args, **(kwargs or {}))

    for layers in (1, 6):
        pool = BlockPool(BLOCK, 10, None)
        pool.add_store([*range(layers)], (1, 1), (1, 1), torch.float32, "cpu")
        whole = grown(pool, pool.table(), 0, [1, 2, 3, 4, 5, 6])
        names.append([])
        with Count():
            if change == "grow":
                pool.writable(whole, 6, 9)
            else:
                pool.writable(whole, 6, 1)  # a sibling takes the cell
                pool.writable(whole, 6 if change == "fork" else 5, 1)
        assert pool.copies == (change != "grow")
    assert names[0] == names[1]
    assert names[0] or change == "grow"


def test_forks_at_a_block_border_copy_nothing():
    pool = pool_of()
    parent = grown(pool, pool.table(), 0, [1, 2, 3, 4])
    forks = [grown(pool, parent, 4, [5 + i]) for i in range(3)]
    assert pool.copies == 0
    assert pool.in_use == 4
    assert [read(pool, fork, 5) for fork in forks] == [[1, 2, 3, 4, 5 + i] for i in range(3)]
    pool.check()


def test_a_rewound_sequence_does_not_overwrite_its_own_future():
    pool = pool_of()
    old = grown(pool, pool.table(), 0, [1, 2])
    new = grown(pool, old, 2, [3, 4, 5, 6, 7])
    other = grown(pool, old, 2, [30, 40, 50])
    assert read(pool, new, 7) == [1, 2, 3, 4, 5, 6, 7]
    assert read(pool, other, 5) == [1, 2, 30, 40, 50]
    assert pool.copies == 1
    pool.check()


def test_blocks_live_as_long_as_the_last_table_that_needs_them():
    pool = pool_of()
    parent = grown(pool, pool.table(), 0, [1, 2, 3, 4, 5])
    child = grown(pool, parent, 5, [6])
    del parent
    assert pool.in_use == 2
    assert read(pool, child, 6) == [1, 2, 3, 4, 5, 6]
    del child
    assert pool.in_use == 0
    pool.check()


# A bounded pool


def test_exhaustion_takes_nothing_and_says_what_was_wanted():
    pool = pool_of(max_blocks=3)
    held = grown(pool, pool.table(), 0, [1] * 8)
    with pytest.raises(PoolExhausted, match=r"2 blocks of 4 tokens wanted, 1 free of max_blocks=3"):
        pool.writable(pool.table(), 0, 8)
    assert pool.in_use == 2
    assert pool.obtainable() == 1
    pool.check()
    assert len(pool.writable(held, 8, 4)) == 3


def test_capacity_never_exceeds_max_blocks():
    pool = pool_of(capacity=4, max_blocks=7)
    table = pool.writable(pool.table(), 0, 7 * BLOCK)
    assert pool.capacity == 7 + RESERVED
    assert pool.obtainable() == 0
    with pytest.raises(MemoryError):
        pool.writable(table, 7 * BLOCK, 1)


def test_a_pool_starts_no_larger_than_max_blocks():
    pool = BlockPool(BLOCK, max_blocks=3)
    assert pool.capacity <= 3 + RESERVED
    with pytest.raises(PoolExhausted):
        pool.writable(pool.table(), 0, 4 * BLOCK)


# Known prefixes


def prefix_of(pool, tokens):
    """A sequence of these tokens, made known; its cells hold the tokens."""
    table = grown(pool, pool.table(), 0, tokens)
    pool.register(table, tokens)
    return table


def test_a_known_prefix_is_found_in_whole_blocks_and_leaves_a_token_to_compute():
    pool = pool_of()
    tokens = list(range(10))
    table = prefix_of(pool, tokens)
    assert pool.match(tokens) == table.blocks[:2]
    assert pool.match(tokens[:8]) == table.blocks[:1]  # the last token has to be computed for its logits
    assert pool.match([*tokens[:4], 9, 9, 9, 9, 9]) == table.blocks[:1]
    assert pool.match([9, *tokens[1:]]) == ()


def test_equal_blocks_behind_different_prefixes_are_different():
    pool = pool_of()
    one, two = prefix_of(pool, [1, 1, 1, 1, 5, 5, 5, 5]), prefix_of(pool, [2, 2, 2, 2, 5, 5, 5, 5])
    assert pool.match([1, 1, 1, 1, 5, 5, 5, 5, 0]) == one.blocks
    assert pool.match([2, 2, 2, 2, 5, 5, 5, 5, 0]) == two.blocks


def test_idle_prefixes_are_kept_until_their_space_is_wanted_oldest_first():
    pool = pool_of(max_blocks=4)
    pool.writable(pool.table(), 0, 4 * BLOCK)  # memory that was never touched would be the last resort
    first, second = prefix_of(pool, [1, 1, 1, 1]), prefix_of(pool, [2, 2, 2, 2])
    del first
    del second
    assert (pool.in_use, pool.cached) == (0, 2)
    assert pool.obtainable() == 4
    pool.check()
    table = pool.writable(pool.table(), 0, 3 * BLOCK)
    assert pool.match([1, 1, 1, 1, 0]) == ()
    assert len(pool.match([2, 2, 2, 2, 0])) == 1
    pool.check()
    del table
    pool.clear_prefixes()
    assert (pool.in_use, pool.cached) == (0, 0)
    assert pool.obtainable() == 4
    pool.check()


def test_a_matched_prefix_is_safe_from_eviction():
    pool = pool_of(max_blocks=3)
    prefix_of(pool, [1, 1, 1, 1])
    found = pool.table(pool.match([1, 1, 1, 1, 0]))
    with pytest.raises(PoolExhausted):
        pool.writable(pool.table(), 0, 3 * BLOCK)
    assert read(pool, found, 4) == [1, 1, 1, 1]
    pool.check()


def test_nothing_is_kept_without_the_prefix_cache():
    pool = pool_of(prefix_cache=False)
    prefix_of(pool, [1, 1, 1, 1])
    assert pool.match([1, 1, 1, 1, 0]) == ()
    assert pool.cached == 0
    pool.check()


def test_a_block_keeps_one_name_when_the_block_before_it_is_forgotten():
    pool = pool_of(max_blocks=6)
    first = prefix_of(pool, [1, 1, 1, 1])
    twin = grown(pool, pool.table(), 0, [1, 1, 1, 1, 2, 2, 2, 2])
    pool.register(twin, [1, 1, 1, 1, 2, 2, 2, 2])  # its second block is known behind the first one of `first`
    del first
    pool.clear_prefixes()
    pool.register(twin, [1, 1, 1, 1, 2, 2, 2, 2])
    del twin
    pool.clear_prefixes()
    pool.check()
    assert pool.match([1, 1, 1, 1, 2, 2, 2, 2, 0]) == ()


# The check itself: every kind of damage is found


def damaged_references(pool, table):
    pool.refs[table.blocks[0]] += 1


def lost_reference(pool, table):
    pool.refs[table.blocks[0]] -= 1


def used_block_in_the_free_list(pool, table):
    pool._free[table.blocks[0]] = True


def free_block_lost(pool, table):
    pool._free[int(pool._free.nonzero()[0][0])] = False


def zero_block_written(pool, table):
    pool.layer(0)[0][ZERO, 1] = 1.0


def prefix_of_a_free_block(pool, table):
    pool.prefixes.blocks[0, (9, 9, 9, 9)] = int(pool._free.nonzero()[0][0])


def block_twice(pool, table):
    table.blocks = (table.blocks[0],) * 2


@pytest.mark.parametrize(
    "damage",
    [
        damaged_references,
        lost_reference,
        used_block_in_the_free_list,
        free_block_lost,
        zero_block_written,
        prefix_of_a_free_block,
        block_twice,
    ],
)
def test_check_finds(damage):
    pool = pool_of()
    table = grown(pool, pool.table(), 0, [1, 2, 3, 4, 5])
    pool.check()
    damage(pool, table)
    with pytest.raises((AssertionError, HandloomError)):
        pool.check()
    table.blocks = ()  # the damaged table must not upset the interpreter when it goes


# States over a pool


@pytest.fixture
def engine():
    engine = Engine(tiny_llama(), block_size=BLOCK, max_length=64)
    yield engine
    assert_nothing_leaked(engine)


def test_forks_of_a_state_share_their_prompt(engine):
    prompt = [5, 6, 7, 8, 9, 10]  # one full block and two cells
    state = engine.prefill(prompt)
    assert engine.pool.in_use == 2
    forked = state.select([0, 0, 0])
    assert engine.pool.in_use == 2
    before = engine.pool.copies
    stepped = engine.step(forked, [1, 2, 3])
    assert engine.pool.copies - before == 2
    assert engine.pool.in_use == 4
    engine.pool.check()
    for row, token in enumerate([1, 2, 3]):
        expected = full_logits(engine.model, [*prompt, token])[-1]
        torch.testing.assert_close(stepped.logits[row], expected, atol=1e-4, rtol=0)
    del state, forked
    gc.collect()
    assert engine.pool.in_use == 4
    del stepped


def test_one_row_of_a_state_can_outlive_the_others(engine):
    state = engine.prefill([[5, 6, 7, 8, 9], [1, 2, 3]])
    assert engine.pool.in_use == 3
    second = state.select([1])
    del state
    gc.collect()
    assert engine.pool.in_use == 1
    after = engine.step(second, [4])
    expected = full_logits(engine.model, [1, 2, 3, 4])[-1]
    torch.testing.assert_close(after.logits[0], expected, atol=1e-4, rtol=0)


def test_an_exhausted_extension_leaves_the_state_usable():
    engine = Engine(tiny_llama(), block_size=BLOCK, max_length=64, max_blocks=3, prefix_cache=False)
    state = engine.prefill([[5, 6, 7], [1, 2, 3]])
    with pytest.raises(PoolExhausted):
        engine.extend(state, [[4] * 6, [4] * 6])
    engine.pool.check()
    assert engine.pool.in_use == 2
    after = engine.step(state, [8, 9])
    for row, ids in enumerate(([5, 6, 7, 8], [1, 2, 3, 9])):
        expected = full_logits(engine.model, ids)[-1]
        torch.testing.assert_close(after.logits[row], expected, atol=1e-4, rtol=0)
    del state, after
    assert_nothing_leaked(engine)
