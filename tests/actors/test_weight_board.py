import pytest

from actors.weight_board import VersionGoneError, WeightBoard


def alive(board, versions):
    found = []
    for version in versions:
        try:
            board.take(version)
            found.append(version)
        except VersionGoneError:
            pass
    return found


def test_an_empty_board_has_no_newest():
    assert WeightBoard().newest_version() is None


def test_at_most_two_versions_are_alive():
    board = WeightBoard()
    for version in range(0, 100, 10):
        board.publish(version, [f"ref{version}"])
        assert len(alive(board, range(100))) <= 2
    assert alive(board, range(100)) == [80, 90]
    assert board.newest_version() == 90
    assert board.take(90) == ["ref90"]


def test_a_pinned_version_stays_until_another_is_pinned():
    board = WeightBoard()
    board.publish(0, ["a"], pin=True)
    for version in (10, 20, 30):
        board.publish(version, ["b"])
    assert alive(board, range(40)) == [0, 30]
    board.publish(40, ["c"], pin=True)
    board.publish(50, ["d"])
    assert alive(board, range(60)) == [40, 50]


def test_a_version_that_is_gone_is_named_with_those_alive():
    board = WeightBoard()
    for version in (1, 2, 3):
        board.publish(version, ["x"])
    with pytest.raises(VersionGoneError, match=r"step 1 are gone; alive are \[2, 3\]"):
        board.take(1)


def test_a_rewound_board_forgets_the_future_only():
    board = WeightBoard()
    board.publish(10, ["a"], pin=True)
    board.publish(20, ["b"])
    board.rewind(15)
    assert alive(board, range(30)) == [10]
    board.publish(12, ["c"])
    assert board.newest_version() == 12


def test_the_nearest_version_is_the_wanted_one_or_else_the_newest():
    board = WeightBoard()
    assert board.nearest_version(10) is None
    board.publish(10, ["a"], pin=True)
    board.publish(20, ["b"])
    board.publish(30, ["c"])
    assert board.nearest_version(10) == 10
    assert board.nearest_version(20) == 30
