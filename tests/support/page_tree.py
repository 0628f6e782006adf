"""A page as a tree of elements, read by a parser that accepts no unclosed or misplaced tag."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
KEEPS_SPACE = {"code", "mark", "pre", "textarea"}


@dataclass
class Element:
    """`children`: texts and elements in order."""

    tag: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str = "") -> Iterator["Element"]:
        """This element and those inside, in the order of the page."""
        if tag in ("", self.tag):
            yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.all(tag)

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("page", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}>: an attribute twice: {attrs}"
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        if data.strip() or "\n" not in data or self.open[-1].tag in KEEPS_SPACE:  # else a line end of the template
            self.open[-1].children.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")


@lru_cache(maxsize=2)
def tree_of(html: str) -> Element:
    """Do not change the tree, it is cached. Raises AssertionError where tags do not match."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [reader.root], f"left open: {[element.tag for element in reader.open[1:]]}"
    return reader.root
