"""JupyterLab as `make lab` starts it: a notebook that was run and saved, but not edited, is for git as it was before.

Saving takes off what nbdev takes off (counts, states of the page). Outputs of cells above the first edited one stay as
they were committed: times, a picture drawn on another machine, and what is skipped for want of data are no changes.
The page shows the new outputs until it is loaded again. `make lab OUTPUTS=new` stores them all."""

import json
import os
import subprocess
from pathlib import Path
from nbdev.clean import clean_nb
from nbdev.config import get_config


def committed_cells(path):
    "The cells of a notebook as the last commit has them; none where it has no such notebook."
    command = ["git", "show", f"HEAD:./{path.name}"]
    try:
        done = subprocess.run(command, cwd=path.parent, capture_output=True)
        return json.loads(done.stdout)["cells"] if done.returncode == 0 else []
    except (OSError, ValueError, KeyError):
        return []


def keep_outputs(cells, committed):
    "Give cells above the first edited one the outputs that they had."
    for cell, old in zip(cells, committed):
        if cell.get("id") != old.get("id") or "".join(cell["source"]) != "".join(old["source"]):
            return
        if cell["cell_type"] == "code":
            cell["outputs"] = old["outputs"]


def before_saving(path, model, contents_manager, **more):
    "What a Jupyter server calls before it writes a file."
    if model["type"] != "notebook" or model["content"]["nbformat"] != 4:
        return
    place = Path(contents_manager.root_dir) / path.lstrip("/")
    settings = get_config(path=contents_manager.root_dir)
    allowed = [settings[key].split() for key in ("allowed_metadata_keys", "allowed_cell_metadata_keys")]
    clean_nb(model["content"], False, *allowed, clean_ids=settings.clean_ids)
    if os.environ.get("OUTPUTS") != "new":
        keep_outputs(model["content"]["cells"], committed_cells(place))


c.ContentsManager.pre_save_hook = before_saving  # noqa: F821  (`c` is Jupyter's)
