"""Where several processes share the tests, each file stays in one of them: files that take long begin first, so that no
process is left with one at the end."""

LONG = (
    "test_kill",
    "test_parallel",
    "test_records",
    "test_runs",
    "test_own_vehicle",
    "test_switches",
    "test_rig",
    "test_heldout",
    "test_platforms",
    "test_wheel",
    "test_viewer",
    "test_first_minutes",
    "test_budget",
    "test_actors",
    "test_frozen",
    "test_reader",
    "test_steady",
    "test_repo",
)


def pytest_collection_modifyitems(items: list) -> None:
    "Sort tests by their file: long ones as listed, then the others as they were found."
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
