"""What a committed run of record says is checked by the same rules that let it be written."""
import json
from pathlib import Path
import pytest
from flux4d.house import repo_root, runs_of_record
from flux4d.record import check_metrics
from flux4d.report import report_text

ROOT = repo_root(Path(__file__).parent)
RECORDS = {run.name: m for run in runs_of_record(ROOT) if (run/"metrics.json").is_file() and "nvs" in (m := json.loads((run/"metrics.json").read_text(encoding="utf-8")))}

@pytest.mark.skipif(not RECORDS, reason="no run of record with novel views is committed")
@pytest.mark.parametrize("name", RECORDS or ["none"])
def test_a_record_follows_the_schema(name): # S6-08, S6-10
    m = RECORDS[name]
    assert check_metrics(m) is m
    assert report_text(m).startswith(f"# Evaluation of {m['subject']}")
