from actors.protocols import Reward
from actors.reward_board import RewardBoard, Standing


def test_the_newest_reward_and_step_hang_there():
    board = RewardBoard()
    assert board.look() == Standing(stage=-1, first_step=0, step=0, reward=None)
    board.begin(2, 80, 80)
    first, second = (Reward(step, step - 80, step - 5, {"loss/pseudo": 1.0}) for step in (90, 100))
    board.post(first)
    board.post(second)
    assert board.look() == Standing(2, 80, 100, second)


def test_a_stage_that_begins_forgets_the_rewards_of_the_one_before():
    board = RewardBoard()
    board.begin(1, 10, 10)
    board.post(Reward(20, 10, 15, {}))
    board.begin(1, 10, 12)
    assert board.look() == Standing(1, 10, 12, None)
