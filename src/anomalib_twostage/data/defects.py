# SPDX-License-Identifier: Apache-2.0
"""The test defects of the sample textures: scratches, cracks, stains, holes, foreign bodies and smears.

They are drawn as shapes (curves, contours, polygons) with light and shadow, and share no code with the painters of
pseudo-anomalies: a detector that has only learnt its training paint must fail here.

A painter takes a clean image, float64 ``(H, W, 3)`` in [0, 255], and a random generator. It returns the opacity
``(H, W)`` in [0, 1] and the paint ``(H, W, 3)``. Light comes from the upper left.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage
from skimage import color, draw

__all__ = ["KINDS", "paint_defect"]

Painter = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]

# Below this opacity nothing is painted: the faint foot of a soft edge would be in the mask and seen by nobody.
_MIN_OPACITY = 0.25
# Mean CIE76 delta E inside the mask. 2.3 is just noticeable side by side; here it has to stand out from a texture.
_MIN_DELTA_E = 12.0
_AREA = (0.004, 0.14)
_ATTEMPTS = 200

_DYES = ((176, 44, 38), (36, 70, 168), (214, 178, 40), (28, 128, 116), (232, 232, 226))
_LIQUIDS = ((150, 74, 26), (44, 66, 132), (82, 118, 34), (134, 40, 52))


def paint_defect(clean: np.ndarray, kind: str, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paint one defect on a clean image.

    A defect that is too small, too large or too faint is drawn again. The mask holds exactly the pixels that
    changed: where the paint happens to equal the surface, one grey level is added, so that it has no pinholes.

    Args:
        clean: uint8 ``(H, W, 3)``.
        kind: One of ``KINDS``.
        index: Number of the image within its kind; the variants of a kind take turns.
        rng: Source of all randomness.

    Returns:
        The defective image, uint8 ``(H, W, 3)``, and its mask, bool ``(H, W)``.

    Raises:
        RuntimeError: If no acceptable defect is found.
    """
    painter = KINDS[kind][index % len(KINDS[kind])]
    surface = clean.astype(np.float64)
    # On an even surface a faint defect is seen too; on a busy one only a strong one is.
    faintest = min(1.0, (surface.std() / 36) ** 2)
    for _ in range(_ATTEMPTS):
        opacity, paint = painter(surface, rng)
        mask = opacity >= _MIN_OPACITY
        if not _AREA[0] <= mask.mean() <= _AREA[1]:
            continue
        strength = rng.uniform(faintest, 1)
        blended = surface + (strength * opacity * mask)[..., None] * (paint - surface)
        defective = np.rint(blended).clip(0, 255).astype(np.uint8)
        same = mask & (defective == clean).all(axis=-1)
        defective[same] = np.where(clean[same] < 128, clean[same] + 1, clean[same] - 1)
        if color.deltaE_cie76(color.rgb2lab(clean), color.rgb2lab(defective))[mask].mean() >= _MIN_DELTA_E:
            return defective, mask
    msg = f"No visible defect of kind {kind!r} was found in {_ATTEMPTS} attempts; is the image flat?"
    raise RuntimeError(msg)


def _bright_scratch(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Light groove with a dark flank."""
    points, widths = _arc(surface.shape, rng, length=(65, 120), width=(2.8, 4.0))
    return _groove(surface, points, widths, tone=rng.uniform(222, 250), flank=rng.uniform(15, 45))


def _dark_scratch(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Dark groove with a light flank."""
    points, widths = _arc(surface.shape, rng, length=(60, 120), width=(2.8, 4.2))
    return _groove(surface, points, widths, tone=rng.uniform(2, 18), flank=rng.uniform(195, 225))


def _crack(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Dark branching polyline that gets thinner, with raised edges."""
    height, width = surface.shape[:2]
    heading = rng.uniform(0, 2 * np.pi)
    forward = np.array([np.sin(heading), np.cos(heading)])
    start = np.array([height, width]) * (rng.uniform(0.4, 0.6, 2) - 0.36 * forward)
    trunk = _walk(start, heading, int(rng.integers(11, 18)), rng)
    thickness = rng.uniform(2.6, 4.4)
    taper = 0.35 + 0.65 * np.sin(np.linspace(0.15, 0.95, len(trunk)) * np.pi)
    limbs = [(trunk, thickness * taper)]
    for joint in rng.choice(np.arange(2, len(trunk) - 2), size=int(rng.integers(2, 5)), replace=False):
        side = heading + rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
        branch = _walk(trunk[joint], side, int(rng.integers(3, 7)), rng)
        limbs.append((branch, 0.7 * thickness * taper[joint] * np.linspace(1, 0.4, len(branch))))
    gap = np.max([_stroke(points, widths, surface.shape) for points, widths in limbs], axis=0)
    lips = np.max([_stroke(points, widths + 2.4, surface.shape) for points, widths in limbs], axis=0)
    paint = _mix(surface * 0.6 + 100, surface * 0.1, gap)
    return np.maximum(gap, 0.55 * lips), paint


def _grey_stain(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Smooth-edged dark or pale blot, strongest along its rim as a dried drop is."""
    depth = _blob(surface.shape, rng, radius=(16, 28))
    rim = np.exp(-(((depth - 0.22) / 0.14) ** 2))
    opacity = _smoothstep(depth / 0.22) * (0.72 + 0.28 * rim)
    paint = surface * rng.uniform(0.15, 0.3) if rng.random() < 0.5 else 238 + 0.3 * (surface - 238)
    return opacity, paint


def _coloured_stain(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rust, ink or algae: coloured, and the texture still shows through."""
    depth = _blob(surface.shape, rng, radius=(4.5, 26))
    liquid = np.array(_LIQUIDS[rng.integers(len(_LIQUIDS))], dtype=np.float64)
    relief = surface.mean(axis=-1, keepdims=True) / max(surface.mean(), 1.0)
    return _smoothstep(depth / 0.3) * rng.uniform(0.75, 0.95), liquid * (0.4 + 0.6 * relief)


def _pit(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Deep hole: black on the side of the light, with a lit wall and a bright lip opposite."""
    depth, lit = _lit_blob(surface.shape, rng, radius=(9, 17))
    floor = ndimage.gaussian_filter(surface, (2, 2, 0))
    wall = (1 - depth.clip(0, 1)) * lit
    paint = floor * (0.14 + 0.75 * wall.clip(0, 1))[..., None]
    lip = _smoothstep((depth + 0.22) / 0.12) * (depth < 0) * (lit > 0.25)
    paint = np.where((depth < 0)[..., None], 0.5 * surface + 120, paint)
    return np.maximum(_smoothstep((depth + 0.03) / 0.1), 0.75 * lip), paint


def _bare_patch(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Place where the surface has come off: dark even ground, with a bright broken edge opposite the light."""
    depth, lit = _lit_blob(surface.shape, rng, radius=(10, 24))
    grain = ndimage.gaussian_filter(rng.standard_normal(surface.shape[:2]), 0.7)
    edge = np.exp(-((depth / 0.14) ** 2)) * lit
    shade = (rng.uniform(28, 48) + 14 * grain) * (1 + edge.clip(-0.8, 0)) + 130 * edge.clip(0, 1)
    return _smoothstep((depth + 0.05) / 0.1), np.repeat(shade[..., None], 3, axis=-1)


def _thread(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Curly dyed thread with the shadow it throws."""
    bend = rng.uniform(0.12, 0.3) * rng.choice([-1, 1])
    start = np.array(surface.shape[:2]) * rng.uniform(0.3, 0.7, 2)
    count = int(rng.integers(24, 44))
    turns = bend + 0.22 * np.cos(np.arange(count) * rng.uniform(0.15, 0.4) + rng.uniform(0, 2 * np.pi))
    points = _steps(start, rng.uniform(0, 2 * np.pi) + np.cumsum(turns), np.full(count, 3.2))
    widths = np.full(len(points), rng.uniform(2.4, 3.6))
    body = _stroke(points, widths, surface.shape)
    core = _stroke(points - 0.4, widths * 0.45, surface.shape)
    shadow = _stroke(points + 2.2, widths, surface.shape)
    dye = np.array(_DYES[rng.integers(len(_DYES))], dtype=np.float64)
    paint = _mix(surface * 0.25, dye * 0.85, body)
    return np.maximum(body, 0.6 * shadow), _mix(paint, 0.55 * dye + 110, core)


def _chip(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Angular splinter of another, striped material with the shadow it throws."""
    height, width = surface.shape[:2]
    corners = int(rng.integers(4, 8))
    angle = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    turn = rng.uniform(0, np.pi)
    long, short = rng.uniform(11, 24), rng.uniform(7, 13)
    y, x = long * np.sin(angle), short * np.cos(angle)
    centre = np.array([height, width]) * rng.uniform(0.25, 0.75, 2)
    outline = centre + np.stack([y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)], axis=-1)
    body, shadow = _polygon(outline, surface.shape), _polygon(outline + 2.5, surface.shape)
    rows, columns = np.mgrid[:height, :width]
    along = rows * np.sin(turn) + columns * np.cos(turn)
    grain = np.sin(along * rng.uniform(0.9, 1.8)) + 0.6 * rng.standard_normal((height, width))
    dye = np.array(_DYES[rng.integers(len(_DYES))], dtype=np.float64)
    return np.maximum(body, 0.6 * shadow), _mix(surface * 0.25, dye * (1 + 0.13 * grain)[..., None], body)


def _dark_smear(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Texture wiped away under a film of oil."""
    return _wipe(surface, rng, film=5.0, density=0.45)


def _pale_smear(surface: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Texture wiped away under a film of plaster."""
    return _wipe(surface, rng, film=248.0, density=0.5)


# Variants of a kind take turns.
KINDS: dict[str, tuple[Painter, ...]] = {
    "crack": (_crack,),
    "foreign_body": (_thread, _chip),
    "hole": (_pit, _bare_patch),
    "scratch": (_bright_scratch, _dark_scratch),
    "smear": (_dark_smear, _pale_smear),
    "stain": (_grey_stain, _coloured_stain),
}


def _mix(below: np.ndarray, above: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Lay ``above`` over ``below`` where ``cover`` ``(H, W)`` is 1."""
    return below + cover[..., None] * (above - below)


def _smoothstep(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return values * values * (3 - 2 * values)


def _groove(
    surface: np.ndarray, points: np.ndarray, widths: np.ndarray, tone: float, flank: float
) -> tuple[np.ndarray, np.ndarray]:
    """Line of one tone and, half a width below it, its flank of another."""
    core = _stroke(points, widths, surface.shape)
    edge = _stroke(points + 1.2, widths, surface.shape)
    return np.maximum(core, 0.55 * edge), _mix(np.full_like(surface, flank), np.full_like(surface, tone), core)


def _wipe(surface: np.ndarray, rng: np.random.Generator, film: float, density: float) -> tuple[np.ndarray, np.ndarray]:
    """Long patch that is blurred along its length and veiled by a film of one tone."""
    height, width = surface.shape[:2]
    turn = rng.uniform(0, np.pi)
    forward = np.array([np.sin(turn), np.cos(turn)])
    centre = np.array([height, width]) * rng.uniform(0.25, 0.75, 2)
    rows, columns = np.mgrid[:height, :width]
    along = (rows - centre[0]) * forward[0] + (columns - centre[1]) * forward[1]
    across = (rows - centre[0]) * forward[1] - (columns - centre[1]) * forward[0]
    across = across + 2.5 * np.sin(along / rng.uniform(7, 12))
    depth = 1 - np.hypot(along / rng.uniform(24, 42), across / rng.uniform(12, 21))
    shifts = np.linspace(-14, 14, 29)
    wiped = np.mean([ndimage.shift(surface, (*(s * forward), 0), order=1, mode="reflect") for s in shifts], axis=0)
    return _smoothstep(depth / 0.3), wiped + density * (film - wiped)


def _arc(
    shape: tuple[int, ...], rng: np.random.Generator, length: tuple[float, float], width: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Slightly bent and uneven line, thinner at both ends: points ``(N, 2)`` and widths ``(N,)``."""
    heading, extent = rng.uniform(0, 2 * np.pi), rng.uniform(*length)
    forward = np.array([np.sin(heading), np.cos(heading)])
    centre = np.array(shape[:2]) * rng.uniform(0.3, 0.7, 2)
    t = np.linspace(-1, 1, 17)[:, None]
    bow = rng.uniform(-0.13, 0.13) * extent * (1 - t * t)
    points = centre + 0.5 * extent * t * forward + bow * forward[::-1] * [1, -1]
    return points, rng.uniform(*width) * (1 - 0.5 * t[:, 0] ** 4) * rng.uniform(0.75, 1.25, len(t))


def _walk(start: np.ndarray, heading: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Jagged path ``(count + 1, 2)`` that keeps its general direction."""
    return _steps(start, heading + rng.normal(0, 0.5, count), rng.uniform(4, 9, count))


def _steps(start: np.ndarray, headings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    moves = lengths[:, None] * np.stack([np.sin(headings), np.cos(headings)], axis=-1)
    return np.concatenate([start[None], start + np.cumsum(moves, axis=0)])


def _stroke(points: np.ndarray, widths: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Anti-aliased coverage ``(H, W)`` of a polyline with a width at each of its points."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    cover = np.zeros(shape[:2])
    for a, b, wide, narrow in zip(points[:-1], points[1:], widths[:-1], widths[1:], strict=True):
        dy, dx = b - a
        t = (((rows - a[0]) * dy + (columns - a[1]) * dx) / (dy * dy + dx * dx)).clip(0, 1)
        distance = np.hypot(rows - a[0] - t * dy, columns - a[1] - t * dx)
        np.maximum(cover, (wide + t * (narrow - wide)) / 2 + 0.5 - distance, out=cover)
    return cover.clip(0, 1)


def _polygon(corners: np.ndarray, shape: tuple[int, ...], fine: int = 4) -> np.ndarray:
    """Anti-aliased coverage ``(H, W)`` of a polygon with corners ``(N, 2)``."""
    height, width = shape[:2]
    mask = draw.polygon2mask((height * fine, width * fine), (corners + 0.5) * fine - 0.5)
    return mask.reshape(height, fine, width, fine).mean(axis=(1, 3))


def _blob(shape: tuple[int, ...], rng: np.random.Generator, radius: tuple[float, float]) -> np.ndarray:
    """Irregular round shape as depth ``(H, W)``: 1 at the centre, 0 on the contour, negative outside."""
    return _lit_blob(shape, rng, radius)[0]


def _lit_blob(
    shape: tuple[int, ...], rng: np.random.Generator, radius: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Depth as in :func:`_blob`, and how much a wall there faces the light, both ``(H, W)``; the latter in [-1, 1]."""
    height, width = shape[:2]
    centre = np.array([height, width]) * rng.uniform(0.22, 0.78, 2)
    rows, columns = np.mgrid[:height, :width]
    y, x = rows - centre[0], columns - centre[1]
    angle = np.arctan2(y, x)
    contour = np.ones(shape[:2])
    for wave in range(2, 7):
        contour += rng.uniform(0, 0.3) / wave * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    size = np.exp(rng.uniform(*np.log(radius)))
    squeeze, turn = rng.uniform(0.7, 1), rng.uniform(0, np.pi)
    along, across = y * np.sin(turn) + x * np.cos(turn), y * np.cos(turn) - x * np.sin(turn)
    depth = 1 - np.hypot(along, across / squeeze) / (size * contour)
    return depth, np.cos(angle - np.pi / 4)
