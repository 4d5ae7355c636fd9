"""The count of pages: what is taken, shared and given back."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_jax.sampling.pages import PagePool, pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_how_many_pages_hold_some_tokens(tokens, pages):
    assert pages_for(tokens, 4) == pages


def test_a_page_is_free_again_when_its_last_user_gives_it_back():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.give_back(pages)
    assert (pool.free, pool.used) == (2, 1)
    pool.give_back(pages[:1])
    assert (pool.free, pool.used) == (3, 0)
    assert sorted(pool.take(3)) == [0, 1, 2]


@pytest.mark.parametrize("misuse", [lambda pool, page: pool.share([page]), lambda pool, page: pool.give_back([page])])
def test_a_free_page_has_no_user_to_join_or_to_leave(misuse):
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.give_back([page])
    with pytest.raises(AssertionError, match=f"page {page} is free"):
        misuse(pool, page)


def test_no_more_pages_are_taken_than_are_free():
    pool = PagePool(2)
    pool.take(1)
    with pytest.raises(AssertionError, match="2 pages are asked for, 1 are free"):
        pool.take(2)
    assert pool.free == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 9), st.lists(st.tuples(st.sampled_from(["take", "share", "give back"]), st.integers(0, 9))))
def test_whatever_is_done_every_page_has_the_users_that_it_should_have(count, actions):
    pool, users = PagePool(count), collections.Counter()
    for action, number in actions:
        taken = sorted(users)
        if action == "take" and number <= pool.free:
            pages = pool.take(number)
            assert len(set(pages)) == number and not users.keys() & set(pages)
            users.update(pages)
        elif action == "share" and number < len(taken):
            pool.share([taken[number]])
            users[taken[number]] += 1
        elif action == "give back" and number < len(taken):
            pool.give_back([taken[number]])
            users = +(users - collections.Counter([taken[number]]))
        assert pool.used == len(users) and pool.free + pool.used == count
    pool.give_back(users.elements())
    assert sorted(pool.take(count)) == list(range(count))
