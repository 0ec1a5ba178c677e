"""docs/upstream.md is what the code says."""

from tests.versions.page import PAGE, text


def test_the_page_is_current():
    assert PAGE.read_text() == text(), "run python -m tests.versions.page"
