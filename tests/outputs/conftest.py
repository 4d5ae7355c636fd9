"""Groups that the tests of this folder share."""

import pytest
from builders import completion, group


@pytest.fixture
def two_groups():
    right_best = group(
        [completion("draft", 0, [5, 6, 9], 1.0, 1.0), completion("draft", 1, [5, 9], 0.0, 1.0)],
        0,
        [completion("refine", 0, [5, 6, 9], 1.0, 1.0), completion("refine", 1, [5, 7, 8], 0.0, 0.0, finished=False)],
    )
    wrong_best = group(
        [completion("draft", 0, [4, 4, 4, 4], 0.0, 1.0, finished=False), completion("draft", 1, [4, 9], 0.0, 0.0)],
        0,
        [completion("refine", 0, [3, 9], 1.0, 0.0), completion("refine", 1, [9], 0.0, 1.0)],
        prompt_id="p1",
    )
    return [right_best, wrong_best]
