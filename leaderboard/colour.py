"""Colours of the pages: the Okabe–Ito palette, two ramps for matrices, and WCAG contrast.

Matrix cells take their colour from classes (``s0`` … ``s24``, ``d0`` … ``d24``), because the pages' content
security policy allows no style attributes; ``heat_css`` writes them for the light and the dark scheme.
"""

from __future__ import annotations

import math

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a", "#f0e442")
"""Colours that people with colour-vision deficiencies tell apart (Okabe and Ito 2008), most contrast first;
black became grey, which shows on both backgrounds."""

N_LEVELS = 25
"""Steps of a ramp; odd, so that a diverging ramp has a neutral middle."""

SEQUENTIAL = {
    "light": ("#f3f8f6", "#a6d3cf", "#3f93a8", "#1d4e7f", "#1b2350"),
    "dark": ("#17242b", "#1c4f63", "#2d87a0", "#7cc4bf", "#e9f6e4"),
}
"""Low loss to high loss."""

DIVERGING = {
    "light": ("#0a5a9c", "#7fb5dc", "#f4f4f2", "#f0a873", "#b8470a"),
    "dark": ("#67b7f0", "#2b6a9b", "#232a33", "#a1552a", "#ff9d62"),
}
"""Better (lower loss) through no change to worse."""

RGB = tuple[float, float, float]


def parse_hex(colour: str) -> RGB:
    """Return the sRGB components, 0 to 1, of ``#rrggbb``."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.2, 0 (black) to 1 (white)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parse_hex(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of WCAG 2.2, 1 to 21."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def text_on(background: str) -> str:
    """Return black or white, whichever is easier to read on ``background`` (always at least 4.58 to 1)."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, background))


def ramp(stops: tuple[str, ...], n_levels: int = N_LEVELS) -> list[str]:
    """Return ``n_levels`` colours from the first stop to the last, linear in sRGB between neighbours."""
    colours = []
    for level in range(n_levels):
        place = level / (n_levels - 1) * (len(stops) - 1)
        left = min(int(place), len(stops) - 2)
        share = place - left
        mixed = [a + (b - a) * share for a, b in zip(parse_hex(stops[left]), parse_hex(stops[left + 1]), strict=True)]
        colours.append("#" + "".join(f"{round(c * 255):02x}" for c in mixed))
    return colours


def level_of(value: float, low: float, high: float) -> int:
    """Return the ramp step of ``value`` between ``low`` and ``high``; the middle one where they are equal."""
    if not high > low:
        return N_LEVELS // 2
    return max(0, min(N_LEVELS - 1, math.floor((value - low) / (high - low) * N_LEVELS)))


def heat_css() -> str:
    """Return the style rules of both ramps in both colour schemes."""

    def rules(scheme: str) -> str:
        lines = []
        for prefix, stops in (("s", SEQUENTIAL[scheme]), ("d", DIVERGING[scheme])):
            for level, colour in enumerate(ramp(stops)):
                lines.append(f".{prefix}{level}{{background:{colour};color:{text_on(colour)}}}")
        return "\n".join(lines)

    return f"{rules('light')}\n@media screen and (prefers-color-scheme:dark){{\n{rules('dark')}\n}}\n"
