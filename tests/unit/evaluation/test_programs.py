from itertools import combinations

import pytest

from lowrank_kit.evaluation.programs import pass_at_k, program_of


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 2), (6, 3), (4, 4)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one(n, k):
    for passed in range(n + 1):
        choices = list(combinations([True] * passed + [False] * (n - passed), k))
        assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize(("n", "passed", "k"), [(2, 1, 3), (2, 3, 1), (2, 1, 0)])
def test_what_cannot_be_estimated_is_an_error(n, passed, k):
    with pytest.raises(ValueError, match=f"no pass@{k} of {passed} in {n}"):
        pass_at_k(n, passed, k)


def test_a_program_of_mbpp_is_set_up_before_its_tests():
    row = {"test_setup_code": "one = 1", "test_list": ["assert f() == one", "assert f() < 2"]}
    program = program_of(row, "def f(): return 1")
    assert (program.answer, program.tests) == ("def f(): return 1", "one = 1\nassert f() == one\nassert f() < 2")
