from html.parser import HTMLParser

import torch
from torch import nn

import secateur as sc


class Texts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_groups_and_locks_and_runs_nothing_of_strangers():
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)))
    net.add_module("</title><script>alert(1)</script>", nn.Conv2d(6, 4, 1))
    view = sc.inspect(net, torch.zeros(1, 3, 8, 8))
    page = view.html()
    parser = Texts()
    parser.feed(page)
    assert [attrs for tag, attrs in parser.tags if tag == "script"] == [{}], "the package's own"
    assert not [a for _, attrs in parser.tags for a in attrs.values() if a and a.startswith(("http", "//"))]
    text = " ".join(parser.text)
    for group in view.groups:
        assert group.name in text
    assert "a dimension of the model's output" in text
    assert "<script>alert(1)</script>" in text, "shown as it is written"
