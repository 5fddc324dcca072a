"""Lists of pairs: the published ones in their own formats, and what is said of a list or an image that is not right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import UserError
from jobs.oodface.protocols import Pairs, load, present, quick

SHARED = Path(__file__).parents[3] / "shared/data/oodface"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/oodface is absent")


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def rows(pairs: Pairs) -> list[tuple]:
    return list(zip(pairs.fold.tolist(), pairs.same.tolist(), pairs.image_a, pairs.image_b, strict=True))


def balance(pairs: Pairs) -> dict[int, tuple[int, int]]:
    """Pairs of one person and pairs of two, of each fold."""
    kinds = {fold: pairs.same[pairs.fold == fold] for fold in pairs.fold.tolist()}
    return {fold: (int(same.sum()), int((~same).sum())) for fold, same in kinds.items()}


@pytest.fixture
def lfw(tmp_path) -> Path:
    """Two folds of one pair of each kind."""
    lines = ("2\t1", "Ann_Lee\t1\t12", "Ann_Lee\t1\tBo\t2", "Bo\t1\t2", "Bo\t1\tCy\t1")
    return write(tmp_path / "pairs.txt", *lines)


@pytest.fixture
def own(tmp_path) -> Path:
    """Three folds of two pairs of each kind; images are called a0, b0 and so on."""
    lines = [f"{n // 4},{int(n % 4 < 2)},a{n}.jpg,b{n}" for n in range(12)]
    return write(tmp_path / "pairs.csv", "fold,same,image_a,image_b", *lines)


def test_lfw(lfw):
    pairs = load("lfw", lfw)
    assert rows(pairs) == [
        (0, True, "Ann_Lee/Ann_Lee_0001", "Ann_Lee/Ann_Lee_0012"),
        (0, False, "Ann_Lee/Ann_Lee_0001", "Bo/Bo_0002"),
        (1, True, "Bo/Bo_0001", "Bo/Bo_0002"),
        (1, False, "Bo/Bo_0001", "Cy/Cy_0001"),
    ]
    assert pairs.places[-1] == f"{lfw} line 5"
    assert pairs.images() == ["Ann_Lee/Ann_Lee_0001", "Ann_Lee/Ann_Lee_0012", "Bo/Bo_0001", "Bo/Bo_0002", "Cy/Cy_0001"]
    assert balance(pairs) == {0: (1, 1), 1: (1, 1)}


@pytest.mark.parametrize(
    ("number", "line", "told"),
    [
        (1, "ten\t300", "line 1 must have the numbers of folds and of pairs"),
        (2, "Ann_Lee\t1", r"line 2 must be NAME, number, number"),
        (2, "Ann_Lee\t1\tBo\t2", r"line 2 must be NAME, number, number"),
        (3, "Ann_Lee\t1\tBo\ttwo", r"line 3 must be NAME, number, NAME, number"),
        (4, "Bo\t1\t1", r"line 4 pairs Bo/Bo_0001 with itself"),
        (5, "", "has 3 pairs, and its first line says 4"),
    ],
)
def test_a_malformed_line_of_lfw_is_named(lfw, number, line, told):
    lines = lfw.read_text().splitlines()
    lines[number - 1] = line
    write(lfw, *lines)
    with pytest.raises(UserError, match=told):
        load("lfw", lfw)


def test_ytf(tmp_path):
    path = write(tmp_path / "splits.txt", "split, ...", "1, 1, Ann/0, Ann/5, 1", "", "2, 1, Ann/0, Bo/1, 0")
    assert rows(load("ytf", path)) == [(0, True, "Ann/0", "Ann/5"), (1, False, "Ann/0", "Bo/1")]
    for line in ("1, 1, Ann/0, Ann/5", "x, 1, Ann/0, Ann/5, 1", "1, 1, Ann, Ann/5, 1", "1, 1, Ann/0, Ann/5, yes"):
        with pytest.raises(UserError, match=r"splits\.txt line 2 must be SPLIT, INDEX"):
            load("ytf", write(path, "head", line))
    with pytest.raises(UserError, match="line 2 has a fold below the first"):
        load("ytf", write(path, "head", "0, 1, Ann/0, Ann/5, 1"))


def cfp_lists(folder: Path, prefix: str) -> None:
    write(folder / f"{prefix}_F.txt", *(f"{n} ../Data/Images/00{n}/frontal/01.jpg" for n in (1, 2)))
    write(folder / f"{prefix}_P.txt", *(f"{n} ../Data/Images/00{n}/profile/04.jpg" for n in (1, 2)))


def test_cfp_fp_as_published_and_as_one_table(tmp_path):
    cfp_lists(tmp_path / "a", "Pair_list")
    for fold, same, diff in (("01", "1,1", "1,2"), ("02", "2,2", "2,1")):
        write(tmp_path / "a" / "Split" / "FP" / fold / "same.txt", same)
        write(tmp_path / "a" / "Split" / "FP" / fold / "diff.txt", diff)
    cfp_lists(tmp_path / "b", "cfp_pair_list")
    lines = ("1,1,1,1", "1,0,1,2", "2,1,2,2", "2,0,2,1")
    write(tmp_path / "b" / "cfp_fp_pairs.csv", "fold,same,frontal_index,profile_index", *lines)
    expected = [
        (0, True, "001/frontal/01", "001/profile/04"),
        (0, False, "001/frontal/01", "002/profile/04"),
        (1, True, "002/frontal/01", "002/profile/04"),
        (1, False, "002/frontal/01", "001/profile/04"),
    ]
    assert rows(load("cfp_fp", tmp_path / "a")) == rows(load("cfp_fp", tmp_path / "b")) == expected
    write(tmp_path / "a" / "Split" / "FP" / "02" / "diff.txt", "2,9")
    with pytest.raises(UserError, match=r"02/diff\.txt line 1 must hold a frontal and a profile number"):
        load("cfp_fp", tmp_path / "a")
    (tmp_path / "b" / "cfp_pair_list_P.txt").unlink()
    with pytest.raises(UserError, match=r"Pair_list_P\.txt cannot be read: No such file"):
        load("cfp_fp", tmp_path / "b")


def test_a_list_of_ones_own(own):
    pairs = load("csv", own)
    assert rows(pairs)[1] == (0, True, "a1", "b1")
    assert balance(pairs) == dict.fromkeys(range(3), (2, 2))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["a,b,c,d"], "line 1 must be fold,same,image_a,image_b"),
        (["fold,same,image_a,image_b", "0,1,a"], "line 2 has 3 values, not 4"),
        (["fold,same,image_a,image_b", "0,1,a,b", "0,2,a,b"], "line 3 is '0,2,a,b', but must be a fold from 0, 1 or 0"),
        (["fold,same,image_a,image_b", "-1,1,a,b"], "but must be a fold from 0"),
        (["fold,same,image_a,image_b", "0,1,a,"], "but must be a fold from 0"),
        (["fold,same,image_a,image_b", "0,1,a,a.jpg"], "line 2 pairs a with itself"),
        (["fold,same,image_a,image_b", "0,1,a,b"], "needs pairs of one person and pairs of two"),
        (["fold,same,image_a,image_b"], "needs pairs of one person and pairs of two"),
        (["fold,same,image_a,image_b", '0,1,"a,b'], "is no CSV with a head and rows"),
        ([], "line 1 must be fold,same,image_a,image_b"),
    ],
)
def test_a_malformed_list_of_ones_own_is_named(own, lines, told):
    with pytest.raises(UserError, match=told):
        load("csv", write(own, *lines))


def test_lists_that_are_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="no protocol 'ijb'; take one of lfw, ytf, cfp_fp, csv"):
        load("ijb", tmp_path)
    with pytest.raises(UserError, match=r"gone\.csv cannot be read: No such file"):
        load("csv", tmp_path / "gone.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not UTF-8"):
        load("csv", tmp_path / "x.csv")


def test_missing_images_are_refused_or_dropped_and_counted(own):
    pairs = load("csv", own)
    known = set(pairs.images()) - {"b1", "a7"}
    told = r"pairs\.csv line 3: image b1 is not among the readable images, and 2 of 12 pairs lack one"
    with pytest.raises(UserError, match=f"{told}.* with oodface.evaluate.missing=drop"):
        present(pairs, known, "refuse")
    kept = present(pairs, known, "drop")
    assert (len(kept), kept.dropped) == (10, 2)
    assert balance(kept) == {0: (1, 2), 1: (2, 1), 2: (2, 2)}
    assert present(kept, known, "refuse") is kept
    assert present(kept, known - {"a0"}, "drop").dropped == 3
    with pytest.raises(UserError, match="0 of 12 pairs are left; check that images and list fit"):
        present(pairs, [], "drop")
    assert present(pairs, pairs.images(), "refuse").dropped == 0


def test_quick_takes_the_first_of_each_kind_and_fold(own):
    few = quick(load("csv", own), 1)
    assert list(few.image_a) == ["a0", "a2", "a4", "a6", "a8", "a10"]
    assert balance(few) == dict.fromkeys(range(3), (1, 1))
    assert rows(quick(load("csv", own), 9)) == rows(load("csv", own))


@needs_shared
@pytest.mark.parametrize(
    ("protocol", "place", "count", "images"),
    [
        ("lfw", "protocols/lfw_pairs.txt", 6000, 7701),
        ("ytf", "protocols/ytf_pairs.txt", 5000, 3226),
        ("cfp_fp", "protocols", 7000, 5901),
        ("csv", "lfw400/pairs.csv", 400, 614),
    ],
)
def test_the_published_lists_have_the_published_numbers(protocol, place, count, images):
    pairs = load(protocol, SHARED / place)
    assert (len(pairs), len(pairs.images())) == (count, images)
    assert balance(pairs) == dict.fromkeys(range(10), (count // 20, count // 20))


@needs_shared
def test_lfw400_is_lfws_first_twenty_of_each_kind_and_fold():
    few = quick(load("lfw", SHARED / "protocols/lfw_pairs.txt"), 20)
    assert sorted(rows(few)) == sorted(rows(load("csv", SHARED / "lfw400/pairs.csv")))
    assert np.array_equal(few.fold, np.repeat(np.arange(10), 40))
