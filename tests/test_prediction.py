"""A prediction as text, as a dictionary and as a table."""

import json
import re
from html.parser import HTMLParser

import numpy as np

from fasterrcnn_jax.data.records import PRINTED, Prediction


def prediction(*names):
    count = len(names)
    boxes = np.arange(4 * count, dtype=np.float32).reshape(count, 4) + np.float32(0.123)
    return Prediction(boxes, np.linspace(0.9, 0.1, count, dtype=np.float32), np.arange(1, count + 1), names)


def test_a_prediction_prints_one_line_per_detection():
    assert repr(prediction("dog", "traffic light")).splitlines() == [
        "Prediction: 2 detections",
        "  dog            0.90  [0.1, 1.1, 2.1, 3.1]",
        "  traffic light  0.10  [4.1, 5.1, 6.1, 7.1]",
    ]
    assert repr(prediction("dog")).startswith("Prediction: 1 detection\n")
    assert repr(prediction()) == "Prediction: 0 detections"


def test_of_many_detections_the_best_are_printed():
    lines = repr(prediction(*["dog"] * (PRINTED + 25))).splitlines()
    assert len(lines) == PRINTED + 2 and lines[-1] == "  and 25 more"
    assert len({len(line) for line in lines[1:-1]}) == 1  # the boxes are aligned


def test_a_line_break_in_a_class_name_does_not_break_a_line():
    assert "  a\\nb  " in repr(prediction("a\nb"))


def test_a_prediction_becomes_json_with_all_its_values():
    found = prediction("dog", "chien «Médor»")
    again = json.loads(json.dumps(found.to_dict()))
    assert list(again) == ["boxes", "scores", "labels", "class_names"]
    for values, name in ((found.boxes, "boxes"), (found.scores, "scores"), (found.labels, "labels")):
        np.testing.assert_array_equal(np.asarray(again[name], values.dtype), values)
    assert again["class_names"] == ["dog", "chien «Médor»"]
    assert prediction().to_dict() == {"boxes": [], "scores": [], "labels": [], "class_names": []}


def test_a_notebook_shows_a_table_with_escaped_class_names():
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags, self.texts = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)

        def handle_data(self, data):
            self.texts.append(data)

    parsed = Tags()
    parsed.feed(prediction("<script>alert(1)</script>", *["dog"] * (PRINTED + 1))._repr_html_())
    assert set(parsed.tags) == {"table", "caption", "tr", "th", "td"} and parsed.tags.count("tr") == PRINTED + 2
    assert "<script>alert(1)</script>" in parsed.texts and "and 2 more" in parsed.texts
    assert not re.search("<img|data:", prediction("dog")._repr_html_())


def test_a_prediction_is_still_a_tuple_of_four():
    boxes, scores, labels, names = prediction("dog")
    assert Prediction._fields == ("boxes", "scores", "labels", "class_names")
    assert (boxes.shape, scores.shape, labels.shape, names) == ((1, 4), (1,), (1,), ("dog",))
