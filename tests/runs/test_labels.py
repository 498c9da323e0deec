"""Every field with a label is one of the schema."""

import re

from isentropic.runs import labels, record


def test_labelled_fields_are_in_the_schema():
    fields = set(re.findall(r"``([\w/]+)``", record.__doc__))
    assert set(labels.METRICS) <= fields
    splits = (labels.QUADRANTS, labels.SIGNS, labels.CLIP_STATES, labels.FORMS)
    for name in (name for split in splits for name in split):
        assert {name, f"predict/{name}"} & fields, name
