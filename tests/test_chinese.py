"""The pages that exist in Chinese say the same as the English ones: section by section."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(file.name for file in (DOCS / "zh").glob("*.md"))


def outline(file):
    """What does not depend on the language: of each section its level, what is set as code, the
    numbers, the links, the rows of tables and the items of lists."""
    sections = []
    for section in re.split(r"^(?=#+ )", file.read_text("utf-8"), flags=re.M)[1:]:
        text = re.sub(r"\[(English|中文)\]\(\S+\)", "", section)
        links = [(file.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", text)]
        sections.append(
            {
                "level": len(re.match("#+", section)[0]),
                "code": sorted(set(re.findall(r"`[^`\n]+`|```.*?```", text, re.S))),
                "links": sorted(links),
                "rows": text.count("\n|"),
                "items": len(re.findall(r"^(?:-|\d+\.) ", text, re.M)),
                "paragraphs": len(re.split(r"\n\n+", text.strip())),
            }
        )
    return sections


@pytest.mark.parametrize("name", PAGES)
def test_both_languages_have_the_same_sections_commands_and_tables(name):
    theirs, ours = outline(DOCS / name), outline(DOCS / "zh" / name)
    assert len(theirs) == len(ours)
    for english, chinese in zip(theirs, ours, strict=True):
        assert english == chinese


@pytest.mark.parametrize("name", PAGES)
def test_each_page_leads_to_the_other(name):
    assert f"(zh/{name})" in (DOCS / name).read_text("utf-8")
    assert f"(../{name})" in (DOCS / "zh" / name).read_text("utf-8")


def test_there_are_pages_in_chinese():
    assert PAGES
