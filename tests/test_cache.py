"""Sequences with a common prefix share KV-cache pages, which the last release frees."""

import random

from expo_fast.inference.kv_pages import Pages, pages_for, pages_to_fork


def test_a_fork_shares_full_pages_and_copies_a_partial_one():
    pages = Pages(10, 4)
    first, copies = pages.fork([], 0, 10)
    assert (len(first), copies) == (3, [])
    second, copies = pages.fork(first, 10, 13)  # two full pages, the third is half full
    assert second[:2] == first[:2]
    assert copies == [(first[2], second[2])]
    assert len(pages.free) == 10 - 1 - 3 - pages_to_fork(10, 13, 4) == 4
    third, copies = pages.fork(first, 8, 9)  # no page is partly filled
    assert (third[:2], copies) == (first[:2], [])
    for table in (first, second, third):
        pages.release(table)
    assert sorted(pages.free) == list(range(1, 10))


def test_a_fork_that_adds_nothing_holds_full_pages_only():
    pages = Pages(5, 4)
    first, _ = pages.fork([], 0, 8)
    again, copies = pages.fork(first, 8, 8)
    assert (again, copies, pages_to_fork(8, 8, 4)) == (first, [], 0)


def test_each_page_is_either_free_or_owned_once():
    chance = random.Random(0)
    pages = Pages(60, 4)
    held: list[tuple[list[int], int, list[int]]] = []  # table, tokens, pages that others share
    for _ in range(2000):
        parent, begun, _ = chance.choice(held) if held and chance.random() < 0.6 else ([], 0, [])
        n = begun + chance.randint(0, 12)
        if pages_to_fork(begun, n, 4) <= len(pages.free) and chance.random() < 0.6:
            table, copies = pages.fork(parent, begun, n)
            assert len(table) == pages_for(n, 4)
            own = table[begun // 4 :]
            assert all(page not in other for page in own for other, _, _ in held)
            assert [target for _, target in copies] == own[: len(copies)]
            held.append((table, n, own))
        elif held:
            pages.release(held.pop(chance.randrange(len(held)))[0])
        in_use = {page for table, _, _ in held for page in table}
        assert in_use.isdisjoint(pages.free)
        assert len(in_use) + len(pages.free) == 59
