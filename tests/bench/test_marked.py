import pytest

from bench.marked import write_between


def test_what_stands_between_the_marks_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- one:end -->\nafter\n")
    for text in ("new", "newer\nlines"):
        write_between(page, "one", text)
        assert page.read_text() == f"before\n<!-- one -->\n{text}\n<!-- one:end -->\nafter\n"


def test_a_page_without_its_marks_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\n")
    with pytest.raises(ValueError, match="needs <!-- one --> and <!-- one:end -->"):
        write_between(page, "one", "new")
    assert page.read_text() == "before\n<!-- one -->\n"
