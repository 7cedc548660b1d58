from pathlib import Path

from secateur.criteria.__main__ import page

ROOT = Path(__file__).parents[3]


def test_the_published_page_is_made_from_the_classes():
    """Made anew with: python -m secateur.criteria > docs/reference/criteria.md."""
    assert (ROOT / "docs" / "reference" / "criteria.md").read_text() == page()
