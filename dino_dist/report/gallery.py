"""The pictures of a run: the crops it trained on, the teacher's attention over time, the use of its prototypes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Final

from dino_dist.report.event_files import Histogram, Picture
from dino_dist.report.markup import Markup, element, join
from dino_dist.report.usage_chart import usage_chart

USAGE_TAG: Final = "health/prototype_usage"
_TITLES: Final = {
    "crops/global": ("Global crops", "What student and teacher see: the first batch of the run"),
    "crops/local": ("Local crops", "What the student alone sees: the first batch of the run"),
    "attention/cls": (
        "Attention over time",
        "Teacher, last layer, CLS token. Each row: an image, the mean of the heads over it, each head",
    ),
}


def gallery(pictures: dict[str, list[Picture]]) -> list[Markup]:
    """A card a tag, those that are known first."""
    order = [*(tag for tag in _TITLES if tag in pictures), *(tag for tag in pictures if tag not in _TITLES)]
    return [_card(tag, number, pictures[tag]) for number, tag in enumerate(order)]


def _card(tag: str, number: int, pictures: Sequence[Picture]) -> Markup:
    title, says = _TITLES.get(tag, (tag, ""))
    figures = [_figure(f"picture-{number}-{place}", title, picture) for place, picture in enumerate(pictures)]
    return element(
        "article",
        element("header", element("h3", title), element("p", says) if says else None),
        element("div", *figures, class_="film" if len(figures) > 1 else "film one"),
        class_="card wide" if len(figures) > 1 else "card",
    )


def _figure(name: str, title: str, picture: Picture) -> Markup:
    """A click enlarges it over the whole page, and another brings the page back; no script is needed for it."""
    source = f"data:{picture.media_type};base64,{base64.b64encode(picture.content).decode('ascii')}"
    image = element(
        "img",
        src=source,
        alt=f"{title} at step {picture.step:,}",
        width=picture.width_px,
        height=picture.height_px,
        decoding="async",
    )
    return element(
        "figure",
        element("a", image, href=f"#{name}", class_="open", aria_label="enlarge"),
        element("a", "close", href="#pictures", class_="close"),
        element("figcaption", f"step {picture.step:,}"),
        id=name,
    )


def usage_card(histograms: Sequence[Histogram]) -> Markup:
    """How evenly the prototypes are used."""
    last, before = histograms[-1], histograms[-4:-1]
    keys = [element("li", element("span", class_="swatch h1"), f"step {last.step:,}")]
    if before:
        steps = ", ".join(f"{histogram.step:,}" for histogram in before)
        keys.append(element("li", element("span", class_="swatch line h2"), f"before: step {steps}"))
    return element(
        "article",
        element(
            "header",
            element("h3", "Prototype usage"),
            element("p", "How many prototypes get how much of the running assignments"),
        ),
        element("ul", *keys, class_="keys"),
        usage_chart(histograms),
        class_="card",
    )


def none_yet() -> Markup:
    """In place of pictures."""
    return join(
        [element("p", "No pictures: TensorBoard files hold none yet, or metrics.tensorboard is off.", class_="empty")]
    )
