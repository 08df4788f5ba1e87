"""What stands for the others of a run while one of its processes is measured."""

import numpy as np

from actors.label_view import LabelView
from actors.protocols import LabelPlan, RuleShape
from actors.records import RecordLayout, encode
from actors.staleness import StalenessPolicy
from pipelines.trial_roles import OneBlock


def test_a_view_reads_the_one_block_for_every_image_and_exchanges_it_after_a_publication():
    layout = RecordLayout((("label", (2, 3)),), 4)
    label = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    block = encode(
        layout,
        ["a", "b"],
        [{"label": label}] * 2,
        [np.array([2, 1, 1, 1])] * 2,
        weights_version=0,
        made_at_step=0,
    )
    transport = OneBlock(block, chunks=3)
    view = LabelView(LabelPlan(RuleShape(layout, 4), StalenessPolicy()), (2, 3), 2, 0, 0, transport)
    everything = np.arange(6)
    for step in range(3):
        view.poll(step, everything)
    assert all(np.array_equal(view.get(index, 3)[0], label) for index in everything)
    assert {held.version for held in view.local.values()} == {0}
    transport.version = 8
    for step in range(3, 6):
        view.poll(step, everything)
    assert {held.version for held in view.local.values()} == {8}
    assert view.misses == 0
