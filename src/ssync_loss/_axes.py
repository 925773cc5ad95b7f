"""Layouts in einops' notation: view a tensor in the library's order of axes."""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt
from operator import index
from typing import TypeAlias

from torch import Tensor

from ssync_loss._checks import check_tensor
from ssync_loss._compilers import constant

Axes: TypeAlias = str | tuple[str, str] | None
Groups: TypeAlias = tuple[tuple[str, ...], ...]
Sizes: TypeAlias = dict[str, int]

# the axes of maps, and of features; only b and t may be left out
MAPS, FEATURES = "btshw", "btdhw"
_ARGUMENTS = {MAPS: "axes", FEATURES: "features_axes"}
# which argument gives a size
_GIVEN = {"t": "num_frames", "h": "grid", "w": "grid"}


def arrange(
    name: str,
    tensor: Tensor,
    axes: str,
    *,
    grid: tuple[int, int] | None = None,
    num_frames: int | None = None,
    num_slots: int | None = None,
) -> Tensor:
    """View a tensor of layout ``axes`` as (B, T, S, H, W), or as (B, T, S, N) if the grid of ``(h w)`` is unknown.

    ``axes`` names b, t, s, h and w in einops' notation, in any order, any of them merged. Without b there is one clip,
    without t one frame.

    Raises: TypeError, ValueError if ``axes`` is no such pattern, does not fit the tensor, or leaves a size open.

    >>> import torch
    >>> arrange("masks", torch.zeros(6, 25, 4), "(b t) (h w) s", num_frames=3).shape
    torch.Size([2, 3, 4, 25])
    """
    height, width = grid or (None, None)
    given = {"t": num_frames, "s": num_slots, "h": height, "w": width}
    sizes = solve(name, tensor, axes, {letter: size for letter, size in given.items() if size is not None})
    return place(name, tensor, axes, sizes, given={"t": "num_frames", "s": "num_slots"})


def arrange_maps(
    enc: Tensor, dec: Tensor, axes: object, grids: Sequence[tuple[int, int] | None], num_frames: int | None
) -> tuple[Tensor, Tensor]:
    """View both maps as (B, T, S, H, W), each on its grid. Sizes that one does not show come from the other.

    A grid that is neither shown nor given is the other map's if N agrees, else a square.
    """
    maps = list(zip(("enc_logits", "dec_logits"), (enc, dec), check_axes(axes), strict=True))
    own: list[Sizes] = [{} if grid is None else {"h": grid[0], "w": grid[1]} for grid in grids]
    sizes: list[Sizes] = [{}, {}]
    shared = {} if num_frames is None else {"t": num_frames}
    # a size that one map shows may let the other show one more
    for turn in (0, 1, 0, 1, 0):
        if [letter for letter in "bts" if letter not in sizes[turn]]:
            sizes[turn] = solve(*maps[turn], {**own[turn], **shared})
            shared = {letter: sizes[turn][letter] for letter in "bts" if letter in sizes[turn]}
    for turn, (one, other) in enumerate(((sizes[0], sizes[1]), (sizes[1], sizes[0]))):
        if "h" in one and "w" in one:
            continue
        num_patches = one.get("n")
        grid = grids[0] if turn else None
        if grid is None and num_patches is not None:
            shown = other.get("h", 0), other.get("w", 0)
            grid = shown if shown[0] * shown[1] == num_patches else square(num_patches)
            if grid is None:
                name, tensor, pattern = maps[turn]
                raise ValueError(
                    f"`{name}` has h*w={num_patches} patches, which is no square: pass grid=(H, W); "
                    f"got {tuple(tensor.shape)} with axes {pattern!r}."
                )
        if grid is not None:
            sizes[turn] = solve(*maps[turn], {**shared, "h": grid[0], "w": grid[1]})
    enc, dec = (place(*one, known) for one, known in zip(maps, sizes, strict=True))
    return enc, dec


def square(num_patches: int) -> tuple[int, int] | None:
    """Return the grid of a square number of patches; None of another."""
    # a compiler traces no root: `index` makes its symbolic size a constant
    root = isqrt(index(num_patches))
    return (root, root) if root * root == num_patches else None


def check_axes(axes: object) -> tuple[str, str]:
    """Return the patterns of the encoder's and the decoder's map."""
    both = (axes, axes) if isinstance(axes, str) else axes
    if not isinstance(both, Sequence) or len(both) != 2:
        raise ValueError(
            f"`axes` must be a pattern such as 'b t s (h w)', or a pair of them (encoder, decoder); got {axes!r}."
        )
    for one in both:
        parse(one)
    return both[0], both[1]


@constant
def parse(axes: object, letters: str = MAPS) -> Groups:
    """Return the letters on every axis of a pattern: of ``"b (h w) 1"`` (("b",), ("h", "w"), ())."""
    if not isinstance(axes, str):
        raise TypeError(
            f"`{_ARGUMENTS[letters]}` must be a pattern such as 'b t {letters[2]} (h w)'; got {type(axes).__name__}."
        )
    return _parse(axes, letters)


@lru_cache
def _parse(axes: str, letters: str) -> Groups:
    name = _ARGUMENTS[letters]
    groups: list[list[str]] = []
    merged = False
    for word in axes.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(" or not (merged or word == ")"):
            groups.append([])
        if word in ("(", ")"):
            if merged == (word == "("):
                raise ValueError(f"`{name}` must close each parenthesis before the next; got {axes!r}.")
            merged = not merged
        elif word != "1":
            groups[-1].append(word)
    if merged:
        raise ValueError(f"`{name}` must close each parenthesis; got {axes!r}.")
    named = [letter for group in groups for letter in group]
    wrong = [f"an unknown {one!r}" for one in named if one not in tuple(letters)]
    wrong += [f"{one!r} twice" for one in letters if named.count(one) > 1]
    wrong += [f"no {one!r}" for one in letters[2:] if one not in named]
    if wrong:
        raise ValueError(
            f"`{name}` must name {', '.join(letters)} once each, of which b and t may be left out; "
            f"got {axes!r}, with {' and '.join(wrong)}."
        )
    return tuple(map(tuple, groups))


def solve(name: str, tensor: Tensor, axes: str, known: Sizes, letters: str = MAPS) -> Sizes:
    """Return the known sizes and those that a tensor's shape shows, by letter; "n" is h * w if it shows only that."""
    check_tensor(name, tensor)
    groups, shape = parse(axes, letters), tensor.shape
    named = [letter for group in groups for letter in group]
    sizes = dict(known)
    for letter in "bt":
        if letter not in named and sizes.setdefault(letter, 1) != 1:
            raise ValueError(f"`{name}` must have {letter}={sizes[letter]}; got axes {axes!r} without {letter!r}.")
    fits = len(shape) == len(groups)
    # no letter stands on two axes, so one look at each is enough
    for group, size in zip(groups, shape, strict=False):
        unknown = [letter for letter in group if letter not in sizes]
        rest = 1
        for letter in group:
            rest *= sizes.get(letter, 1)
        if not unknown:
            fits = fits and rest == size
        elif len(unknown) == 1 or sorted(unknown) == ["h", "w"]:
            fits = fits and rest > 0 and size % rest == 0
            if fits:
                sizes[unknown[0] if len(unknown) == 1 else "n"] = size // rest
    if not fits:
        wanted = ", ".join("*".join(group) or "1" for group in groups)
        given = ", ".join(f"{letter}={known[letter]}" for letter in letters if letter in known)
        raise ValueError(
            f"`{name}` must have shape ({wanted}){given and ' with '}{given}, as axes {axes!r} say; got {tuple(shape)}."
        )
    return sizes


def place(
    name: str, tensor: Tensor, axes: str, sizes: Sizes, letters: str = MAPS, given: dict[str, str] = _GIVEN
) -> Tensor:
    """View a tensor in the order of the letters, with known sizes; ``(h w)`` of an unknown grid stays one axis.

    Axes are only split and reordered, which is a view for all strides. ``given`` names the arguments of the caller that
    give a size.
    """
    named = "".join([letter for group in parse(axes, letters) for letter in group])
    if "n" in sizes and "hw" in named:
        named, letters = named.replace("hw", "n"), letters.replace("hw", "n")
    unknown = [letter for letter in letters if letter not in sizes]
    if unknown:
        remedies = {f" Give `{given[letter]}`.": None for letter in unknown if letter in given}
        for group in parse(axes, letters):
            # one size of a merged axis follows from the others
            for letter in [one for one in group if one in unknown and one not in given][1:]:
                remedies[f" Give {letter} an axis of its own, by `unflatten`."] = None
        raise ValueError(
            f"`{name}` of shape {tuple(tensor.shape)} and axes {axes!r} leaves {' and '.join(unknown)} open."
            + "".join(remedies)
        )
    order = named + "".join([letter for letter in letters if letter not in named])
    split = tensor.reshape([sizes[letter] for letter in order])
    return split.permute([order.index(letter) for letter in letters])
