"""What every picture must hold: its texts lie apart, and inside it."""

import itertools


def assert_apart_and_inside(figure, boxes):
    """``boxes``: pairs of a text and its extent in the drawn figure."""
    for (first, box), (second, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), f"{first.get_text()!r} overlaps {second.get_text()!r}"
    width, height = figure.bbox.size
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text.get_text()!r} is cut off"
