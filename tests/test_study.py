"""What is missing runs, what is finished stays, what was run otherwise is refused, and processes share a grid without a cell twice or never."""
from dataclasses import dataclass

import pytest

from fvlm.core import ConfigError
from fvlm.training.records import read_records, write_record
from fvlm.training.study import Study, check_shard, missing_cells

CELLS = {f"here--arm--seed{seed}": {"arm": "arm", "seed": seed} for seed in range(5)}


def record(root, run, config=None):
    write_record(root, "study", run, config=config or CELLS[run], parameters=0)


def test_shards_cover_every_cell_once_whenever_they_look(tmp_path):
    first = missing_cells(tmp_path, "study", CELLS, shard=(0, 2))
    for run in first[:2]:
        record(tmp_path, run)
    second = missing_cells(tmp_path, "study", CELLS, shard=(1, 2))  # looks later than the first: its share is the same
    assert sorted(first + second) == sorted(CELLS) and not set(first) & set(second)
    assert missing_cells(tmp_path, "study", CELLS) == [run for run in CELLS if run not in first[:2]]


def test_another_recipe_is_refused_by_name_and_difference(tmp_path):
    record(tmp_path, "here--arm--seed0", {"arm": "arm", "seed": 7})
    with pytest.raises(ConfigError, match=r"study/here--arm--seed0: was run with another recipe \(seed: 7 then, 0 now\)"):
        missing_cells(tmp_path, "study", CELLS)
    assert missing_cells(tmp_path, "study", CELLS, differences=lambda then, now: []) == list(CELLS)[1:]


def test_a_record_of_no_wanted_cell_is_left_alone(tmp_path):
    record(tmp_path, "there--arm--seed0", {"anything": 1})
    assert missing_cells(tmp_path, "study", CELLS) == list(CELLS)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_is_none(tmp_path, shard):
    with pytest.raises(ConfigError, match="shard: got"):
        check_shard(shard)
    with pytest.raises(ConfigError, match="shard: got"):
        Toy(question="?", settings=dict).run("study", {}, root=tmp_path, shard=shard)


@dataclass(frozen=True, kw_only=True)
class Toy(Study):
    "Settings are numbers of cells."

    def _run(self, grid):
        cells = {f"{setting}--{i}": {"i": i} for setting, count in grid.settings.items() for i in range(count)}
        missing = missing_cells(grid.root, grid.study, cells, shard=grid.shard)
        for run in missing:
            write_record(grid.root, grid.study, run, config=cells[run], parameters=0)
        return missing

    def _table(self, records, setting):
        return ", ".join(record.run for record in records)


def test_a_study_runs_once_and_tells_its_own_settings_records(tmp_path):
    toy = Toy(question="?", settings=lambda: {"few": 2, "fewer": 1})
    assert toy.run("toy", toy.settings(), root=tmp_path, work=tmp_path) == ["few--0", "few--1", "fewer--0"]
    assert toy.run("toy", toy.settings(), root=tmp_path, work=tmp_path) == []
    records = read_records(tmp_path, "toy")
    assert toy.table(records, "few") == "few--0, few--1" and toy.table(records, "fewer") == "fewer--0" and toy.table(records, "none") is None


def test_checkpoints_lie_in_the_cache_folder_unless_told(own_home, tmp_path):
    seen = []

    class Looking(Toy):
        def _run(self, grid):
            seen.append(grid.work)
            return []

    for work in (None, tmp_path / "mine"):
        Looking(question="?", settings=dict).run("toy", {}, root=tmp_path, work=work)
    assert seen == [own_home / "studies", tmp_path / "mine"]
