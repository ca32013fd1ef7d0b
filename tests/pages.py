"""Pages as a browser would find them, without a browser."""

import json
from html import escape
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What a browser would find: addresses, tags outside scripts, text, and the data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.data: list[dict] = []
        self.words = ""
        self.policy = ""
        self.scripts = 0
        self.tables: list[tuple[str, list[list[str]]]] = []  # (what stands above, rows with the headings)
        self._inside = self._title = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.addresses += [str(values[name]) for name in ("src", "href", "srcset", "data", "action") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        self._inside = "json" if values.get("type") == "application/json" else tag
        self.scripts += tag == "script" and self._inside != "json"
        if tag == "table":
            self.tables.append((self._title, []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
            self._exact = values.get("title")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("h3", "summary"):
            self._title = data
        elif self._inside == "caption":
            self.tables[-1] = (data, self.tables[-1][1])
        elif self._inside in ("td", "th"):
            self.tables[-1][1][-1][-1] = self._exact or data
        if self._inside == "json":
            self.data.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.words += data

    def figure(self, title: str) -> dict:
        return next(each for each in self.data if each.get("title") == title)

    def table(self, title: str) -> list[dict[str, str]]:
        """Rows of a table, by heading; of an interval the exact numbers."""
        headings, *rows = next(found for name, found in self.tables if name == title)
        return [dict(zip(headings, row, strict=True)) for row in rows]

    def rows(self, title: str) -> list[dict]:
        """Numbers of a chart, by column."""
        table = self.figure(title)["table"]
        return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def check_run_page(folder: Path) -> Page:
    """The page that a run wrote into its own folder: of this run, under its final name, without any answer."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert f"{folder}-again" in page.words  # the command that repeats it
    assert ".partial" not in page.words
    for file in (*folder.glob("responses.jsonl"), *folder.glob("*/responses.jsonl")):
        answers = {json.loads(line)["response"] for line in file.read_text(encoding="utf-8").split("\n") if line}
        assert answers
        assert not [a for a in answers if len(a) > 12 and (a in html or escape(a) in html)]
    return page
