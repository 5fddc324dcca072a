"""Which pairs of images are compared: the lists of LFW, YTF and CFP-FP, and lists of one's own."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from cluster.errors import UserError
from jobs.oodface.sources import without_suffix

COLUMNS = ["fold", "same", "image_a", "image_b"]
CFP_COLUMNS = ["fold", "same", "frontal_index", "profile_index"]
Row = tuple[int, bool, str, str, str]  # fold, same, image_a, image_b, place


@dataclass(frozen=True)
class Pairs:
    """Pairs in the order of their list; images are called as in `sources.Located`.

    fold: (n,) from 0. same: (n,), whether both are of one person. places: where each pair stands, as FILE line N.
    dropped: pairs of the list that are not here, because an image was missing.
    """

    fold: Int[np.ndarray, " n"]
    same: Bool[np.ndarray, " n"]
    image_a: tuple[str, ...]
    image_b: tuple[str, ...]
    places: tuple[str, ...]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.fold)

    def images(self) -> list[str]:
        """Every image that some pair has, once, in alphabetical order."""
        return sorted({*self.image_a, *self.image_b})

    def take(self, chosen: Bool[np.ndarray, " n"], dropped: int) -> Pairs:
        """The chosen pairs, with `dropped` counted as missing."""
        kept = np.flatnonzero(chosen)
        texts = (tuple(column[at] for at in kept) for column in (self.image_a, self.image_b, self.places))
        return Pairs(self.fold[kept], self.same[kept], *texts, dropped)


def load(protocol: str, path: Path) -> Pairs:
    """The pairs of a list.

    Args:
        protocol: lfw, ytf, cfp_fp or csv (see `PROTOCOLS`).
        path: the file, for cfp_fp the folder that holds the lists.

    Raises:
        UserError: unknown protocol, a file that is missing, a line that is malformed or pairs an image with itself
            (file and line are named), or a list without both kinds of pairs.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"there is no protocol '{protocol}'; take one of {', '.join(PROTOCOLS)}")
    rows = []
    for row in PROTOCOLS[protocol](path):
        fold, _, first, second, place = row
        if first == second:
            raise UserError(f"{place} pairs {first} with itself; mend the line")
        if fold < 0:
            raise UserError(f"{place} has a fold below the first; mend the line")
        rows.append(row)
    kinds = {same for _, same, *_ in rows}
    if len(kinds) < 2:
        of = "one person" if kinds == {True} else "two people"
        has = f"all its {len(rows)} pairs are of {of}" if rows else "it has none"
        raise UserError(f"{path} needs pairs of one person and pairs of two people, but {has}; add the others")
    folds, same, first, second, places = zip(*rows, strict=True)
    return Pairs(np.array(folds), np.array(same), first, second, places)


def present(pairs: Pairs, images: Collection[str], missing: Literal["refuse", "drop"]) -> Pairs:
    """The pairs whose two images are there.

    Args:
        images: the image_ids that can be used.
        missing: whether a pair of another image is an error, or left out and counted in `dropped`.

    Raises:
        UserError: an image is missing and `missing` is refuse, or no pair of one of the kinds is left.
    """
    known = set(images)
    there = np.array([a in known and b in known for a, b in zip(pairs.image_a, pairs.image_b, strict=True)])
    absent = np.flatnonzero(~there)
    if not absent.size:
        return pairs
    first = absent[0]
    lost = next(name for name in (pairs.image_a[first], pairs.image_b[first]) if name not in known)
    told = f"{pairs.places[first]}: image {lost} is not among the readable images"
    if missing == "refuse":
        raise UserError(
            f"{told}, and {absent.size} of {len(pairs)} pairs lack one; add the images, or leave such pairs out "
            "with oodface.evaluate.missing=drop"
        )
    kept = pairs.take(there, pairs.dropped + absent.size)
    if len(set(kept.same.tolist())) < 2:
        raise UserError(f"{told}, and {len(kept)} of {len(pairs)} pairs are left; check that images and list fit")
    return kept


def quick(pairs: Pairs, per_fold: int = 5) -> Pairs:
    """The first `per_fold` pairs of each kind of each fold, in the order of the list."""
    chosen = np.zeros(len(pairs), dtype=bool)
    for fold in np.unique(pairs.fold):
        for kind in (True, False):
            chosen[np.flatnonzero((pairs.fold == fold) & (pairs.same == kind))[:per_fold]] = True
    return pairs.take(chosen, pairs.dropped)


def lfw(path: Path) -> Iterator[Row]:
    """LFW's pairs.txt: a line FOLDS, PAIRS; then for each fold PAIRS lines NAME, I, J and PAIRS lines NAME, I, NAME, J.

    Source: Huang et al., Labeled Faces in the Wild, 2007, View 2.
    """
    lines = _lines(path, "\t")
    place, head = next(lines, (f"{path} line 1", []))
    if len(head) != 2 or not all(_whole(part) and int(part) for part in head):
        raise UserError(f"{place} must have the numbers of folds and of pairs, as 10 and 300; name LFW's pairs.txt")
    folds, each = map(int, head)
    count = 0
    for count, (place, parts) in enumerate(lines, start=1):
        fold, at = divmod(count - 1, 2 * each)
        same = at < each
        numbers = parts[1::2] if not same else parts[1:]
        if len(parts) != (3 if same else 4) or not all(_whole(number) for number in numbers):
            wanted = "NAME, number, number" if same else "NAME, number, NAME, number"
            raise UserError(f"{place} must be {wanted}, with tabs between them; mend the line")
        names = (parts[0], parts[0]) if same else (parts[0], parts[2])
        first, second = (f"{name}/{name}_{int(n):04d}" for name, n in zip(names, numbers, strict=True))
        yield fold, same, first, second, place
    if count != folds * 2 * each:
        raise UserError(f"{path} has {count} pairs, and its first line says {folds * 2 * each}; take the whole file")


def ytf(path: Path) -> Iterator[Row]:
    """YouTube Faces' splits: a head line, then SPLIT, INDEX, NAME/VIDEO, NAME/VIDEO, SAME with splits from 1.

    Source: Wolf et al., Face Recognition in Unconstrained Videos with Matched Background Similarity, 2011.
    """
    for place, parts in _lines(path, ",", head=True):
        fits = len(parts) == 5 and _whole(parts[0]) and parts[4] in ("0", "1")
        if not fits or not all("/" in name for name in parts[2:4]):
            raise UserError(f"{place} must be SPLIT, INDEX, NAME/VIDEO, NAME/VIDEO, 0 or 1; mend the line")
        yield int(parts[0]) - 1, parts[4] == "1", parts[2], parts[3], place


def cfp_fp(path: Path) -> Iterator[Row]:
    """CFP's frontal-profile pairs, of the folder Protocol as published, or of the two lists and `cfp_fp_pairs.csv`.

    Split/FP/01..10/same.txt and diff.txt hold FRONTAL,PROFILE: numbers of Pair_list_F.txt and Pair_list_P.txt, whose
    lines are NUMBER PATH. The CSV has the head fold,same,frontal_index,profile_index with folds from 1.
    Source: Sengupta et al., Frontal to Profile Face Verification in the Wild, 2016.
    """
    sides = [_numbered(path, side) for side in "FP"]
    for fold, same, numbers, place in _cfp_rows(path):
        if len(numbers) != 2 or not all(number in side for number, side in zip(numbers, sides, strict=True)):
            raise UserError(f"{place} must hold a frontal and a profile number of the two lists; mend the line")
        yield fold, same, sides[0][numbers[0]], sides[1][numbers[1]], place


def own(path: Path) -> Iterator[Row]:
    """A CSV of one's own with the head fold,same,image_a,image_b.

    Folds from 0; same 1 or 0; images by their paths, with or without extension.
    """
    for place, (fold, same, first, second) in _table(path, COLUMNS):
        if not _whole(fold) or same not in ("0", "1") or not (first and second):
            found = ",".join((fold, same, first, second))
            raise UserError(
                f"{place} is '{found}', but must be a fold from 0, 1 or 0 (same), two images; mend the line"
            )
        yield int(fold), same == "1", without_suffix(first), without_suffix(second), place


PROTOCOLS: Mapping[str, Callable[[Path], Iterable[Row]]] = {"lfw": lfw, "ytf": ytf, "cfp_fp": cfp_fp, "csv": own}


def _cfp_rows(path: Path) -> Iterator[tuple[int, bool, list[str], str]]:
    split = path / "Split" / "FP"
    if not split.is_dir():
        for place, (fold, same, *numbers) in _table(path / "cfp_fp_pairs.csv", CFP_COLUMNS):
            if not _whole(fold) or same not in ("0", "1"):
                raise UserError(f"{place} must begin with a fold from 1, and 0 or 1; mend the line")
            yield int(fold) - 1, same == "1", numbers, place
        return
    for fold, folder in enumerate(sorted(one for one in split.iterdir() if one.is_dir())):
        for name, same in (("same.txt", True), ("diff.txt", False)):
            for place, numbers in _lines(folder / name, ","):
                yield fold, same, numbers, place


def _numbered(folder: Path, side: str) -> dict[str, str]:
    """Image by number: lines such as `1 ../Data/Images/001/frontal/01.jpg`, an image being 001/frontal/01."""
    names = (f"Pair_list_{side}.txt", f"cfp_pair_list_{side}.txt")
    path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    found = {}
    for place, parts in _lines(path, None):
        if len(parts) != 2 or parts[1].count("/") < 2:
            raise UserError(f"{place} must be a number and a path such as ../Data/Images/001/frontal/01.jpg")
        found[parts[0]] = without_suffix("/".join(parts[1].split("/")[-3:]))
    return found


def _lines(path: Path, separator: str | None, head: bool = False) -> Iterator[tuple[str, list[str]]]:
    """(place, stripped parts) of the lines that are not empty; of white space where there is no separator."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip() and not (head and number == 1):
            yield f"{path} line {number}", [part.strip() for part in line.split(separator)]


def _table(path: Path, columns: list[str]) -> Iterator[tuple[str, list[str]]]:
    try:
        head, *rows = [*csv.reader(_text(path).splitlines(), strict=True)] or [[]]
    except csv.Error as error:
        raise UserError(f"{path} is no CSV with a head and rows ({error}); mend the file") from None
    if [name.strip() for name in head] != columns:
        raise UserError(f"{path} line 1 must be {','.join(columns)}; put that head over the rows")
    for number, parts in enumerate(rows, start=2):
        place = f"{path} line {number}"
        if len(parts) not in (0, len(columns)):
            raise UserError(f"{place} has {len(parts)} values, not {len(columns)}; mend the line")
        if parts:
            yield place, [part.strip() for part in parts]


def _whole(text: str) -> bool:
    """Whether this is a whole number of at most nine digits."""
    return text.isascii() and text.isdecimal() and len(text) < 10


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"list of pairs {path} cannot be read: {told}; check the path") from None
