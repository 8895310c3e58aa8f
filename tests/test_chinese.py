"""The pages that exist in Chinese say the same as the English ones: section by section."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHINESE = ROOT / "docs" / "zh"
PAGES = sorted(file.name for file in CHINESE.glob("*.md"))


def english(name):
    return ROOT / name if name == "README.md" else ROOT / "docs" / name


def outline(file):
    """What does not depend on the language: of each section its level, what is set as code, the
    pages that it leads to, the rows of tables and the items of lists."""
    sections = []
    for section in re.split(r"^(?=#+ )", file.read_text("utf-8"), flags=re.M)[1:]:
        text = re.sub(r"\[(English|中文)\]\(\S+\)", "", section)
        links = [(file.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", text)]
        # A Chinese page leads to others in Chinese.
        links = [english(link.name) if link.parent == CHINESE else link for link in links]
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
    theirs, ours = outline(english(name)), outline(CHINESE / name)
    assert len(theirs) == len(ours)
    for one, other in zip(theirs, ours, strict=True):
        assert one == other


@pytest.mark.parametrize("name", PAGES)
def test_each_page_leads_to_the_other(name):
    for here, there in [(english(name), CHINESE / name), (CHINESE / name, english(name))]:
        links = re.findall(r"\[(?:English|中文)\]\(([^)]+)\)", here.read_text("utf-8"))
        assert [(here.parent / link).resolve() for link in links] == [there]


@pytest.mark.parametrize("name", PAGES)
def test_a_chinese_page_leads_to_others_in_chinese_where_there_are_some(name):
    for link in re.findall(r"(?<!\[English)\]\(([^)#\s]+)", (CHINESE / name).read_text("utf-8")):
        target = (CHINESE / link).resolve()
        assert target.name not in PAGES or target != english(target.name), link


def test_what_a_course_needs_is_there_in_chinese():
    assert {"README.md", "how-it-works.md", "no-gpu.md", "safety.md"} <= set(PAGES)
