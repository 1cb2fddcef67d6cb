"""Lessons about training fail for a model that was not trained; what cannot be trained in is refused; figures
are those of their records."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from flux4d.cache import LiftCache
from flux4d.city.logs import fixture_city
from flux4d.clips import Clip, ClipConfig, build_index, select_clips
from flux4d.overfit import gate_faults, gate_scores, overfit_gate
from flux4d.pandaset import PandaSet
from flux4d.config import Config, config_from_dict
from flux4d.loader import Loader
from flux4d.train import Trainer
from flux4d.run import Run
from flux4d.unet import Kernels, spconv_constants, use_precision

ROOT = Path(__file__).parents[1]
TINY = dict(
    data=dict(image_scale=0.25, loader_threads=1),
    init=dict(fill_blocks=[64, 32]),
    voxel=dict(size=0.5),
    model=dict(unet=dict(widths=[8, 16], blocks=1), hidden=16, motion_prior=dict(reach=0)),
    train=dict(iters=12, warmup=1, log_every=1, eval_every=0, save_ckpt_every=0, views_per_step=1),
)


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    "A run whose steps change nothing."
    torch.set_num_threads(1)
    root, tmp = fixture_city(), tmp_path_factory.mktemp("idle")
    record = select_clips(build_index(root, ClipConfig()))[0]
    clip = Clip(PandaSet(root)[record["scene_id"]], record)
    cfg = config_from_dict(TINY, Config)
    cfg.train.lr = cfg.train.weight_decay = 0.0  # no parameter may be 0; set past the gate
    trainer = Trainer(cfg, Loader([clip], cfg, LiftCache(tmp / "cache")), Run(tmp / "run"))
    with redirect_stdout(io.StringIO()):
        rows = trainer.fit()
    return trainer, clip, rows


@pytest.mark.parametrize("full", [False, True])
def test_gate_of_the_base_model_fails_an_untrained_model(idle, full):
    trainer, clip, rows = idle
    scores = gate_scores(trainer, trainer.loader.batch(0), clip.frames[:4])
    assert scores["trained"] == scores["untrained"]
    faults = gate_faults(overfit_gate(rows, start=1), scores, full)
    assert any("adds 0.00 dB" in f for f in faults) and any("adds 0.000 SSIM" in f for f in faults)


def test_windows_of_the_log_cannot_excuse_an_untrained_model(idle):
    trainer, clip, _ = idle
    scores = gate_scores(trainer, trainer.loader.batch(0), clip.frames[:1])
    assert gate_faults(dict(loss_ratio=0.1, psnr_gain=9.0, speed_change=0.0), scores, True)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "half"])
def test_a_precision_that_cannot_be_trained_in_is_refused(precision):
    with pytest.raises(ValueError, match="model.unet.precision: is .*; choose auto, float32 or tf32"):
        config_from_dict(dict(model=dict(unet=dict(precision=precision))), Config)


def test_a_process_keeps_its_precision():
    class Fresh(Kernels):
        pass

    switch = spconv_constants.SPCONV_ALLOW_TF32
    use_precision("float32", "cpu", Fresh)
    use_precision("tf32", "cuda", Fresh)
    with pytest.raises(ValueError, match="start a new process"):
        use_precision("float32", "cuda", Fresh)
    spconv_constants.SPCONV_ALLOW_TF32 = switch


def prose(notebook, heading):
    "The text of a notebook from a heading of its record to the next."
    cells = json.loads((ROOT / f"nbs/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.split(rf"\*\*{heading}\.\*\*", text)[1].split("\n\n**")[0]


def test_figures_of_refinement_are_those_of_its_records():
    said = prose("50_refine", "Concluded")
    records = {
        r: json.loads((ROOT / f"papermill_runs/{r}/metrics.json").read_text(encoding="utf-8"))
        for r in ("pandaset002_pair_n3", "pandaset002_pair_n1")
    }

    def value(r, region, when, metric="psnr"):
        return records[r]["nvs"][region][when][metric]["mean"]

    for r, m in records.items():
        assert r in said and f"{m['runtime']['iters']:,} steps" in said
        for region in ("full", "dynamic"):
            pair = " / ".join(f"{value(r, region, when):.2f}" for when in ("interpolation", "future"))
            assert f"{pair} dB" in said, f"{r}, {region}: {pair}"
        depth = f"{value(r, 'full', 'interpolation', 'depth_rmse'):.2f} m"
        assert depth in said, f"{r}: {depth}"
