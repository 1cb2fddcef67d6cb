"""Every parameter of a notebook and every field of a configuration is checked by its type and range, before a
file is touched.

Which values are wrong follows from the declarations, so a new parameter is covered as soon as it is declared."""

import ast
import copy
import math
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints
import pytest
import yaml
from pydantic import TypeAdapter
from flux4d.ablation import AblationParameters
from flux4d.actor_scores import ActorScoreConfig
from flux4d.actors import ActorConfig
from flux4d.announce import announcement
from flux4d.baselines import NSFPConfig
from flux4d.bench import BenchParameters
from flux4d.clips import ClipConfig, build_index
from flux4d.evaluate import EvaluationParameters, eval_clips_of, read_evaluation
from flux4d.flow import FlowParameters
from flux4d.heldout import HeldoutParameters
from flux4d.notebooks import read_notebook
from flux4d.records import repo_root
from flux4d.view_scores import EvalConfig
from flux4d.overfit import OverfitParameters
from flux4d.files import DataError
from flux4d.log_files import fabricate_log
from flux4d.refine import FullConfig
from flux4d.settings import read_parameters, read_settings
from flux4d.parameters import PARAMETER_OF, TrainingParameters, make_config, read_training
from flux4d.run_setup import check_images, make_index, split_clips
from flux4d.config import RENAMED, config_from_dict, config_to_dict, flattened, without_retired

ROOT = repo_root(Path(__file__).parent)
NOTEBOOKS = {
    "60_stage6": TrainingParameters,
    "61_evaluate": EvaluationParameters,
    "61a_heldout": HeldoutParameters,
    "62_ablation": AblationParameters,
    "40_flow": FlowParameters,
    "35_overfit": OverfitParameters,
    "80_bench": BenchParameters,
}
GATES = {TrainingParameters: read_training, EvaluationParameters: read_evaluation}
CONFIGS = FullConfig, EvalConfig, ClipConfig, NSFPConfig
ODD = (
    None,
    True,
    "maybe",
    "",
    "1e999",
    " 7 ",
    -1,
    0,
    1.5,
    2**70,
    math.nan,
    -math.inf,
    "nan",
    [],
    [None],
    [[1]],
    ["a", "a"],
    {},
    {"a": 1},
    b"x",
    object(),
)


def leaves(cls, at=""):
    "Dotted name and declared type of each field."
    hints = get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            yield from leaves(hints[f.name], f"{at}{f.name}.")
        else:
            yield f"{at}{f.name}", hints[f.name]


def nested(name, value):
    "A dotted name as nested dicts."
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def schemas(hint):
    "The alternatives of a type, as JSON schemas."
    schema = TypeAdapter(hint).json_schema()
    return schema.get("anyOf", [schema])


def borders(hint):
    "Values at the ends of a type's range, and values just beyond."
    for s in schemas(hint):
        step = 1 if s.get("type") == "integer" else 1e-6
        for key, way in (("minimum", -1), ("maximum", 1)):
            if key in s:
                yield s[key], s[key] + way * step
        for key, way in (("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
            if key in s:
                yield s[key] + way * step, s[key]


def sentence(error, name):
    "Is it one sentence that names the parameter?"
    text = str(error.value)
    assert error.type is DataError and error.value.__cause__ is None, text
    assert (
        text.split(":")[0].endswith(name)
        and "\n" not in text
        and text[-1] in ".?"
        and ". " not in text
        and len(text) < 1000
    ), text


def gate(cls, values):
    "What a notebook does with its parameters first."
    return GATES[cls](values) if cls in GATES else read_parameters(cls, values)


PARAMETERS = [
    pytest.param(cls, name, hint, id=f"{nb}-{name}")
    for nb, cls in NOTEBOOKS.items()
    for name, hint in leaves(cls)
]
FIELDS = [
    pytest.param(cls, name, hint, id=f"{cls.__name__}-{name}")
    for cls in CONFIGS
    for name, hint in leaves(cls)
]


# by declaration


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "An empty folder that must stay empty."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLUX4D_PANDASET", raising=False)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cls,name,hint", PARAMETERS)
def test_wrong_type_of_a_parameter(cls, name, hint):
    refused = 0
    for value in ODD:
        try:
            gate(cls, {name: value})
        except DataError as e:
            refused += 1
            assert str(e).startswith(f"{name}: "), (value, str(e))
    assert refused >= 4


@pytest.mark.parametrize("cls,name,hint", PARAMETERS)
def test_borders_of_a_parameter(cls, name, hint):
    for at, beyond in borders(hint):
        gate(cls, {name: at})
        gate(cls, {name: str(at)})
        with pytest.raises(DataError) as e:
            gate(cls, {name: beyond})
        sentence(e, name)
    for word in (w for s in schemas(hint) for w in s.get("enum", [])):
        if word != "static":
            gate(cls, {name: word})
        with pytest.raises(DataError) as e:
            gate(cls, {name: f"{word}x"})
        sentence(e, name)


@pytest.mark.parametrize("cls,name,hint", FIELDS)
def test_field_of_a_configuration(cls, name, hint):
    refused = 0
    for value in ODD:
        try:
            read_settings(cls, nested(name, value), "overrides")
        except DataError as e:
            refused += 1
            assert str(e).startswith(f"overrides.{name}"), (value, str(e))
    assert refused >= 4
    for at, beyond in borders(hint):
        try:
            read_settings(cls, nested(name, at))
        except DataError as e:
            assert " is " in str(e) and "choose" in str(e)  # a rule between fields
        with pytest.raises(DataError) as e:
            read_settings(cls, nested(name, beyond))
        sentence(e, name)


@pytest.mark.parametrize("cls", [*CONFIGS, *NOTEBOOKS.values()])
def test_no_count_without_a_range_and_no_list_without_a_type(cls):
    def bare(hint):
        return (
            hint in (int, tuple, list)
            or get_origin(hint) in (tuple, list)
            and any(bare(a) for a in get_args(hint))
        )

    assert [name for name, hint in leaves(cls) if bare(hint)] == []


@pytest.mark.parametrize("nb", NOTEBOOKS)
def test_cell_and_dataclass_agree(nb):
    cls = NOTEBOOKS[nb]
    cell = next(
        c
        for c in read_notebook(ROOT / f"nbs/{nb}.ipynb").cells
        if "parameters" in c["metadata"].get("tags", [])
    )
    given = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(cell["source"]).body}
    assert list(given) == [f.name for f in fields(cls)]
    read = read_parameters(cls, given)
    assert (
        read == cls() and read_parameters(cls, vars(read)) == read
    )  # a gate that runs twice changes nothing


def assigned(source):
    "Names that a cell itself assigns, not those inside its functions."
    waiting = ast.parse(re.sub(r"^[%!].*", "", source, flags=re.M)).body
    while waiting:
        n = waiting.pop()
        if isinstance(
            n,
            (
                ast.FunctionDef,
                ast.ClassDef,
                ast.Lambda,
                ast.ListComp,
                ast.SetComp,
                ast.DictComp,
                ast.GeneratorExp,
            ),
        ):
            continue
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            yield n.id
        waiting += ast.iter_child_nodes(n)


@pytest.mark.parametrize("nb", NOTEBOOKS)
def test_no_other_variable_is_taken_for_a_misspelt_parameter(nb):
    cells = [c["source"] for c in read_notebook(ROOT / f"nbs/{nb}.ipynb").cells if c["cell_type"] == "code"]
    objects = {"train_clips", "eval_clips", "model"}  # clips and a network, which no command line gives
    names = (
        {name for source in cells for name in assigned(source)}
        - objects
        - {f.name for f in fields(NOTEBOOKS[nb])}
    )
    read_parameters(NOTEBOOKS[nb], dict.fromkeys(names, 1))


# by example


@pytest.mark.parametrize(
    "name,given,read",
    (
        ("use_depth", "false", False),
        ("overwrite", "False", False),
        ("resume_optimizer", 0, False),
        ("iters", "3e4", 30_000),
        ("minutes", "10", 10.0),
        ("train_logs", 2, ("002",)),
        ("eval_logs", "2, 011", ("002", "011")),
        ("train_without_frames", 0, frozenset({0})),
        ("train_without_frames", "40-42", frozenset({40, 41, 42})),
        ("eval_starts", "0,40", (0, 40)),
        ("lidar_sensors", "0,1", (0, 1)),
        ("cameras", ["front_camera"], ("front_camera",)),
        ("num_refine", "none", None),
        ("max_gaussians", "1000", 1000),
        ("overrides", "{train: {lr: 5e-4}}", {"train": {"lr": "5e-4"}}),
    ),
)
def test_what_is_meant(name, given, read):
    assert getattr(read_training({name: given})[0], name) == read


@pytest.mark.parametrize("nb", GATES.items(), ids=lambda pair: pair[0].__name__)
def test_examples_in_the_comments_are_accepted(nb):
    cls, read = nb
    name = next(name for name, c in NOTEBOOKS.items() if c is cls)
    cell = next(
        c
        for c in read_notebook(ROOT / f"nbs/{name}.ipynb").cells
        if "parameters" in c["metadata"].get("tags", [])
    )
    examples = re.findall(r"^(\w+) = .*?# .*?(\{.*\})", cell["source"], re.M)
    assert {name for name, _ in examples} >= {"eval_overrides"}
    for parameter, example in examples:
        read({parameter: example})


def test_numbers_that_yaml_takes_for_text():
    assert read_training(dict(overrides=yaml.safe_load("{train: {lr: 5e-4}}")))[1].train.lr == 5e-4
    assert read_training(dict(num_refine="1", use_depth="false", max_gaussians=0))[1].loss.use_depth is False


@pytest.mark.parametrize(
    "values,text",
    (
        (dict(max_gaussians=-5), "max_gaussians: is -5; choose a whole number at least 0 or none."),
        (
            dict(train_without_frames="9-3"),
            "train_without_frames: is '9-3'; choose frames such as 40-55, both included, or 7 for one.",
        ),
        (
            dict(overrides={"train": {"grad_clip": 0}}),
            "overrides.train.grad_clip: is 0; choose a number above 0.",
        ),
        (
            dict(overrides={"train": {"lr": "fast"}}),
            "overrides.train.lr: is 'fast'; choose a number above 0.",
        ),
        (dict(overrides={"train": {"lrr": 1}}), "overrides.train: has no field 'lrr'; did you mean lr"),
        (dict(overrides={"train": 5}), "overrides.train: is 5; give fields by name"),
        (
            dict(overrides={"data": {"image_scale": {"a": 1}}}),
            "overrides.data.image_scale: is {'a': 1}; choose",
        ),
        (dict(overrides={"voxel": {"low": [200, -50, -6]}}), "overrides.voxel: The voxel grid"),
        (
            dict(overrides={"voxel": {"size": 1e-6}}),
            "overrides.voxel.size: is 1e-06, which makes more cells than can be numbered",
        ),
        (
            dict(overrides={"flow": {"blur_window": 4}}),
            "overrides.flow.blur_window: is 4; choose an odd number",
        ),
        (
            dict(overrides={"render": {"near": 1e5}}),
            "overrides.render.near: is 100000.0; choose less than far",
        ),
        (
            dict(eval_overrides={"metric": {"ssim_window": 4}}),
            "eval_overrides.metric.ssim_window: is 4; choose an odd number of pixels.",
        ),
        (
            dict(overrides={"train": {"iters": 5}}),
            "overrides.train.iters: is decided by the parameter iters; give it there.",
        ),
        (
            dict(overrides={"data": {"image_scale": 0.5}}),
            "overrides.data.image_scale: is decided by the parameter image_scale; give it there.",
        ),
        (dict(out_dir="a" * 5000), "out_dir: is 'aaaa"),
        (dict(out_dir="a\0b"), "out_dir: is 'a"),
        (dict(out_dir="x/" + "b" * 300), "out_dir: is 'x/bbb"),
        (dict(data_root="a" * 5000), "data_root: is 'aaaa"),
        (dict(index_path="a" * 300), "index_path: is 'aaaa"),
        (dict(resume_from="a" * 300), "resume_from: is 'aaaa"),
        (
            dict(eval_overrides={"metric": {"max_depth": 0}}),
            "eval_overrides.metric.max_depth: is 0; choose a number above 0 or none.",
        ),
        (dict(preset="papers"), "preset: is 'papers'; choose default, paper"),
        (
            dict(baselines="lift,oracle"),
            "baselines: is 'lift,oracle'; choose a list without repetition, each lift, ",
        ),
        (
            dict(train_settings="train_interp"),
            "train_settings: is 'train_interp'; choose a list without repetition, each train_interpolation, ",
        ),
        (dict(train_logs="002,2"), "train_logs: is '002,2'; choose a list without repetition"),
        (dict(itres=5), "itres: is no parameter of this notebook; did you mean iters?"),
        (dict(device="gpu"), "device: is 'gpu'; choose cpu, cuda"),
        (dict(device="cuda:99"), "device: is 'cuda:99', but torch finds "),
        (dict(index_path="no.pkl"), "index_path: no.pkl is no file"),
        (
            dict(index_path="no.pkl", train_stride=2),
            "train_stride: is 2, but the clips of index_path are cut already",
        ),
        (dict(resume_from="no.pt"), "resume_from: no.pt is no file"),
        (
            dict(resume_from="last", out_dir="papermill_runs"),
            "resume_from: is last, but papermill_runs holds no ckpt_last.pt",
        ),
        (
            dict(data_root="nowhere"),
            "data_root: nowhere is no folder; name one that holds PandaSet's log folders",
        ),
        (dict(out_dir=f"{__file__}/run"), "out_dir: test_parameters.py is a file, not a folder"),
    ),
)
def test_what_is_refused(values, text):
    with pytest.raises(DataError) as e:
        read_training(values)
    sentence(e, text.split(":")[0])
    assert str(e.value).startswith(text), str(e.value)


@pytest.mark.parametrize(
    "values,text",
    (
        (dict(checkpoint="no.pt"), "checkpoint: no.pt is no file"),
        (dict(checkpoint="a" * 5000), "checkpoint: is 'aaaa"),
        (dict(out_dir="a\0"), "out_dir: is 'a"),
        (dict(checkpoint=__file__, preset="paper"), "preset: the checkpoint brings its own configuration"),
        (dict(baseline="static"), "baseline: 'static' needs the Gaussians of a checkpoint"),
        (dict(max_clips=-1), "max_clips: is -1; choose a whole number at least 0."),
        (dict(long_log="perhaps"), "long_log: is 'perhaps'; choose true or false."),
        (dict(eval_overrides={"lable": {}}), "eval_overrides: has no field 'lable'; did you mean labels?"),
    ),
)
def test_what_is_refused_in_evaluation(values, text):
    with pytest.raises(DataError) as e:
        read_evaluation(values)
    sentence(e, text.split(":")[0])
    assert str(e.value).startswith(text), str(e.value)


def test_no_steps_from_a_checkpoint():
    p, cfg, _ = read_training(dict(iters=0, resume_from=__file__))
    assert (p.iters, cfg.train.iters, cfg.train.warmup) == (0, 0, 1)


def with_names_of_today(values):
    "A configuration whose fields of earlier versions are renamed, as the sentence about them asks for."
    values = copy.deepcopy(values)
    for old, new in RENAMED.items():
        *groups, name = old.split(".")
        at = values
        for group in groups:
            at = at.get(group, {})
        if name in at:
            at[new.split(".")[-1]] = at.pop(name)
    return without_retired(values)


@pytest.mark.parametrize("run", sorted(p.parent.name for p in ROOT.glob("papermill_runs/*/config.yaml")))
def test_configurations_of_record_still_load(run):
    values = yaml.safe_load((ROOT / f"papermill_runs/{run}/config.yaml").read_text(encoding="utf-8"))
    if "parameters" in values:  # 73b_actor_scores: settings of its own, no model's
        assert config_to_dict(config_from_dict(values["actors"], ActorConfig)) == values["actors"]
        assert config_to_dict(config_from_dict(values["scores"], ActorScoreConfig)) == values["scores"]
        return
    values = {k: v for k, v in values.items() if k not in ("eval", "coord", "bench")}  # scores, index, 80_bench
    if (today := with_names_of_today(values)) != values:  # a run of an earlier version
        with pytest.raises(DataError, match="a field of an earlier version of flux4d"):
            config_from_dict(values, FullConfig)
        values = today
    read = config_to_dict(config_from_dict(values, FullConfig))

    def kept(given, read):
        return all(kept(v, read[k]) if isinstance(v, dict) else v == read[k] for k, v in given.items())

    assert kept(values, read)


def test_what_is_left_out_keeps_the_default_of_its_place():
    read = config_from_dict(
        {"model": {"fine_prior": {"reach": 3}}, "refine": {"unet": {"widths": [8, 8]}}}, FullConfig
    )
    usual = FullConfig()
    assert (read.model.fine_prior.cell, read.refine.unet.blocks) == (
        usual.model.fine_prior.cell,
        usual.refine.unet.blocks,
    ) and read.model.fine_prior.reach == 3


# by the data


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for log in ("001", "002"):
        fabricate_log(root, log, 20, ("front_camera",))
    return root


@pytest.mark.parametrize(
    "values,text",
    (
        (
            dict(train_logs="003"),
            "train_logs: '003' is not among the logs of the data root; there are 001, 002.",
        ),
        (
            dict(eval_logs="1,7"),
            "eval_logs: '007' is not among the logs of the data root; there are 001, 002.",
        ),
        (
            dict(eval_starts="0,5"),
            "eval_starts: 5 is not among the first frames of evaluation clips; there are 0.",
        ),
        (
            dict(train_without_frames="0-19"),
            "index: holds no clip with split train, scene_id 002, leaving out frames 0 to 19; "
            "relax a condition or build the index "
            "with train_scenes and test_scenes that give such clips.",
        ),
        (
            dict(fixed_target_frame=11),
            "fixed_target_frame: is 11, but the shortest training clip has frames 0 to 10; choose one of them.",
        ),
    ),
)
def test_what_the_data_does_not_have(logs, values, text):
    p = read_parameters(TrainingParameters, dict(eval_logs="001", train_logs="002") | values)
    with pytest.raises(DataError) as e:
        split_clips(logs, make_index(logs, p), p, FullConfig())
    assert str(e.value) == text


def test_images_too_small_for_their_measures(logs):
    p = read_parameters(TrainingParameters, dict(eval_logs="001", train_logs="002", image_scale=0.01))
    clip = split_clips(logs, make_index(logs, p), p, FullConfig())[2][0]
    with pytest.raises(
        DataError,
        match=r"image_scale: is 0.01, which makes images of \d+ x \d+ px; choose one that leaves at least 11 px.",
    ):
        check_images(clip, make_config(p), EvalConfig())


def test_evaluation_clips_that_are_not_there(logs):
    with pytest.raises(
        DataError, match="eval_logs: '007' is not among the logs of the data root; there are 001, 002."
    ):
        eval_clips_of(logs, ("front_camera",), ("007",))
    with pytest.raises(DataError, match="eval_starts: 9 is not among"):
        eval_clips_of(logs, ("front_camera",), ("001",), (9,))


def test_logs_choose_among_the_clips_of_an_index(logs, elsewhere, tmp_path_factory):
    index = build_index(logs, ClipConfig(test_scenes=("001", "002"), train_scenes=("001", "002")))
    p = read_parameters(TrainingParameters, dict(train_logs="002", eval_logs="001"))
    train, _, judged = split_clips(logs, index, p, FullConfig())
    assert ({c.log.id for c in train}, {c.log.id for c in judged}) == ({"002"}, {"001"})


# one log, which is none of the paper's test logs


@pytest.fixture(scope="module")
def one_log(tmp_path_factory):
    root = tmp_path_factory.mktemp("one")
    fabricate_log(root, "002", 56, ("front_camera",))
    return root


@pytest.mark.parametrize("given", ({}, dict(train_logs="002"), dict(eval_logs="002")), ids=("none", "train", "eval"))
def test_one_log_is_told_which_parameters_work(one_log, given):
    p = read_parameters(TrainingParameters, given)
    with pytest.raises(DataError) as e:
        make_index(one_log, p)
    said = str(e.value)
    assert said.startswith(("eval_logs: is empty", "train_logs: is empty")[bool(given.get("eval_logs"))])
    words = said.partition("for example with ")[2].removesuffix(".").split()
    assert words[::3] == ["-p"] * 4
    named = dict(zip(words[1::3], words[2::3]))
    p = read_parameters(TrainingParameters, named)
    train, watched, judged = split_clips(one_log, make_index(one_log, p), p, FullConfig(), aside=3)
    assert train and watched and [c.frames[0] for c in judged] == [40]
    assert not {f for c in [*train, *watched] for f in c.frames} & set(judged[0].frames)


def test_one_log_announces_no_run_that_cannot_start(one_log):
    names = dict(preset="default", device="cpu", iters=3, minutes=0.0, image_scale=1.0, out_dir="", resume_from="")
    names |= dict(data_root=str(one_log), index_path="", train_logs="", eval_logs="")
    assert announcement(names) == []
    assert announcement(names | dict(train_logs=2, eval_logs="002"))


def test_other_logs_are_told_what_to_be_judged_by(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    for log in ("002", "005"):
        fabricate_log(root, log, 20, ("front_camera",))
    sentence = "(002, 005) is one of the paper's ten test logs; name some, for example with -p eval_logs 005."
    with pytest.raises(DataError, match=re.escape(sentence)):
        make_index(root, TrainingParameters())
    with pytest.raises(DataError, match=re.escape(sentence)):
        eval_clips_of(root, ("front_camera",), ())
    p = TrainingParameters(eval_logs=("005",))
    train, _, judged = split_clips(root, make_index(root, p), p, FullConfig())
    assert {c.log.id for c in train} == {"002"} and {c.log.id for c in judged} == {"005"}


# the notebooks themselves


@pytest.mark.parametrize(
    "nb,given",
    (
        ("60_stage6", dict(overwrite="true", max_gaussians=-5)),
        ("61_evaluate", dict(overwrite="true", max_clips=-1)),
    ),
)
def test_a_notebook_stops_before_it_touches_a_file(nb, given, tmp_path_factory, monkeypatch):
    shell = pytest.importorskip("execnb.shell").CaptureShell
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell puts its own there
    home = tmp_path_factory.mktemp("home")
    run = home / "run"
    run.mkdir()
    (run / "metrics.json").write_text("{}")  # a finished run, to be overwritten
    monkeypatch.chdir(ROOT)  # where a notebook that runs by itself would make its folders

    def files():
        return sorted(
            (str(p), p.stat().st_mtime_ns)
            for p in [*home.rglob("*"), *ROOT.glob("papermill_runs/*"), *ROOT.glob("data/*")]
        )

    before, kernel = files(), shell()
    for cell in read_notebook(ROOT / f"nbs/{nb}.ipynb").cells:
        if cell["cell_type"] != "code":
            continue
        kernel.run(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            kernel.run(
                "\n".join(f"{k} = {v!r}" for k, v in dict(given, out_dir=str(run)).items())
            )  # as papermill does
        if kernel.exc:
            break
    name, value = list(given.items())[-1]
    assert type(kernel.exc).__name__ == "DataError" and str(kernel.exc).startswith(
        f"{name}: is {value}; choose"
    ), kernel.exc
    assert files() == before


GIVEN = dict(  # a value of each parameter that decides a field
    cameras=("left_camera",),
    image_scale=0.5,
    train_settings=("train_future",),
    lidar_sensors=(0, 1),
    max_gaussians=5000,
    num_sky_points=700,
    poly_degree=2,
    num_refine=2,
    velocity_reweighting=False,
    use_depth=False,
    iters=40,
    minutes=2.0,
    log_every=7,
    save_ckpt_every=8,
    eval_every=9,
    seed=11,
    views_per_step=4,
    grad_accum_steps=3,
    fixed_target_frame=5,
)


@pytest.mark.parametrize("field", PARAMETER_OF)
def test_a_field_with_a_parameter_of_its_own_is_set_by_it_and_given_once(field):
    given = {PARAMETER_OF[field]: GIVEN[PARAMETER_OF[field]]}
    usual = flattened(config_to_dict(make_config(TrainingParameters())))
    asked = flattened(config_to_dict(make_config(TrainingParameters(**given))))
    assert asked[field] != usual[field], "the parameter does not reach its field"
    sentence = f"overrides.{field}: is decided by the parameter {PARAMETER_OF[field]}; give it there."
    with pytest.raises(DataError, match=re.escape(sentence)):
        make_config(TrainingParameters(**given, overrides=nested(field, usual[field])))


def test_every_parameter_that_reaches_the_configuration_is_in_the_table():
    assert set(GIVEN) == set(PARAMETER_OF.values())
    usual = config_to_dict(make_config(TrainingParameters()))
    for f in fields(TrainingParameters):
        if f.name in GIVEN or f.name in ("preset", "overrides"):
            continue
        for value in (True, False, 2, 0.5, "x", ("x",), (0,), dict(save_renders=1)):
            changed = TrainingParameters(**({f.name: value} if f.name != "train_stride" else {}))
            assert config_to_dict(make_config(changed)) == usual, f"{f.name} is not in the table"
