"""The tuner of the Triton kernels, as far as it goes without a GPU: candidates, choice, table."""

from __future__ import annotations

import json

import pytest

from benchmarks import tune_triton
from benchmarks.tune_triton import KINDS, Key, Tiles, candidates, choose, dump, keys

HEAD_DIMS = [64, 96, 128, 256]


def test_every_entry_of_the_table_has_a_few_candidates() -> None:
    every = list(keys(list(KINDS), HEAD_DIMS))
    assert len(set(every)) == len(every) == len(KINDS) * len(HEAD_DIMS) * 4
    for key in every:
        found = candidates(key)
        assert len(set(found)) == len(found)
        assert 3 <= len(found) <= 40, f"{key.kind} {key}: {len(found)}"


NOW, FAST, SLOW = (64, 64, 4, 2), (128, 64, 8, 2), (32, 32, 4, 2)


def chosen(
    times: dict[Tiles, float], wrong: tuple[Tiles, ...] = ()
) -> tuple[Tiles, list[str], list[Tiles]]:
    checked: list[Tiles] = []

    def seconds(tiles: Tiles) -> float:
        if tiles not in times:
            raise RuntimeError("out of resource: shared memory\nmore lines")
        return times[tiles]

    def check(tiles: Tiles) -> None:
        checked.append(tiles)
        assert tiles not in wrong, "error too large"

    lines: list[str] = []
    return choose([SLOW, FAST], NOW, seconds, check, lines.append), lines, checked


def test_the_fastest_is_chosen_and_checked() -> None:
    tiles, _, checked = chosen({NOW: 2.0, FAST: 1.0, SLOW: 3.0})
    assert tiles == FAST
    assert checked == [FAST]


def test_what_is_hardly_faster_changes_nothing() -> None:
    assert chosen({NOW: 1.0, FAST: 0.99, SLOW: 3.0})[0] == NOW


def test_what_does_not_run_is_left_out() -> None:
    tiles, lines, _ = chosen({NOW: 2.0, SLOW: 1.5})
    assert tiles == SLOW
    assert f"{FAST} left out: out of resource: shared memory" in lines
    assert chosen({SLOW: 9.0})[0] == SLOW
    assert chosen({})[0] == NOW


def test_what_is_wrong_is_not_chosen() -> None:
    tiles, lines, _ = chosen({NOW: 2.0, FAST: 1.0, SLOW: 1.5}, wrong=(FAST,))
    assert tiles == SLOW
    assert f"{FAST} is wrong: error too large" in "".join(lines)


def test_the_table_survives_being_written() -> None:
    table = {"sm_90": {"attention_fwd": {"64 dense 16": [128, 64, 8, 3], "x": [1, 2, 3, 4]}}}
    text = dump(table)
    assert json.loads(text) == table
    assert '"64 dense 16": [128, 64, 8, 3],\n' in text


def test_the_file_is_as_the_tuner_writes_it() -> None:
    pytest.importorskip("fastgpt.backends.triton._tuning")
    text = tune_triton.table_file().read_text()
    assert dump(json.loads(text)) == text


@pytest.mark.parametrize("tiles", [(16, 16, 1, 1), (32, 64, 8, 4)])
def test_tiles_are_used_inside_alone(tiles: Tiles) -> None:
    pytest.importorskip("fastgpt.backends.triton._tuning")
    key = Key("attention_fwd", 64, narrow=False, wide=False)
    for architecture in ("sm_90", "sm_00"):
        before = tune_triton.now_used(key, architecture)
        with tune_triton.using(key, architecture, tiles):
            assert tune_triton.now_used(key, architecture) == tiles
        assert tune_triton.now_used(key, architecture) == before
