"""The tests, a file about a file; `stage`, `peers` and `pages` are what they share."""

import pytest

pytest.register_assert_rewrite("tests.stage", "tests.peers", "tests.pages")
