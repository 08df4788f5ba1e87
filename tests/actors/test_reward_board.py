from actors.protocols import Reward
from actors.reward_board import RewardBoard, Standing


def test_the_newest_reward_and_step_hang_there():
    board = RewardBoard()
    assert board.look() == Standing(stage=-1, first_step=0, step=0, reward=None)
    board.begin(2, 80, 80)
    first, second = (Reward(step, step - 80, step - 5, {"loss/pseudo": 1.0}) for step in (90, 100))
    board.post(Standing(2, 80, 90, first))
    board.post(Standing(2, 80, 100, second))
    assert board.look() == Standing(2, 80, 100, second)


def test_a_step_without_a_reward_leaves_the_last_one_of_its_stage():
    board, reward = RewardBoard(), Reward(90, 10, 85, {})
    board.post(Standing(2, 80, 90, reward))
    board.post(Standing(2, 80, 110))
    assert board.look() == Standing(2, 80, 110, reward)
    board.post(Standing(3, 200, 210))
    assert board.look().reward is None


def test_a_board_that_starts_again_knows_the_stage_with_the_next_word():
    board = RewardBoard()
    board.post(Standing(2, 80, 440))
    assert (board.look().stage, board.look().first_step, board.look().step) == (2, 80, 440)


def test_a_stage_that_begins_forgets_the_rewards_of_the_one_before():
    board = RewardBoard()
    board.begin(1, 10, 10)
    board.post(Standing(1, 10, 20, Reward(20, 10, 15, {})))
    board.begin(1, 10, 12)
    assert board.look() == Standing(1, 10, 12, None)
