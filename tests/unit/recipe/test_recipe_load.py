# ruff: noqa: E501 (messages are shown whole)
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import FileRefusedError, RecipeError
from secateur.recipe import Recipe, bundled, dump_recipe, load_recipe

GOOD = "target: {sparsity: 0.5}"


def message(source, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(source, overrides)
    return str(error.value)


def test_the_same_recipe_from_every_source(tmp_path):
    text = "criterion: taylor\ntarget:\n  macs: 0.5\nprotect: [head.*]\n"
    (tmp_path / "r.yaml").write_text("\ufeff" + text, encoding="utf-8")
    mapping = {"criterion": "taylor", "target": {"macs": 0.5}, "protect": ("head.*",)}
    first = load_recipe(text)
    assert first == load_recipe(tmp_path / "r.yaml") == load_recipe(str(tmp_path / "r.yaml"))
    assert first == load_recipe(mapping) == load_recipe(first)
    assert load_recipe(dump_recipe(first)) == first


def test_a_mapping_is_not_changed():
    mapping = {"target": {"macs": 0.5}, "recover": []}
    load_recipe(mapping, ["target.macs=0.4", "recover.0.method=bn_refresh"])
    assert mapping == {"target": {"macs": 0.5}, "recover": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "target:\n  sparsity: 50",
            "recipe:2: target.sparsity: sparsity is a fraction in [0, 1): 50 looks like a percentage, write 0.5",
        ),
        (
            "target: {sparsity: 90%}",
            "recipe:1: target.sparsity: sparsity is a fraction in [0, 1): 90% is a percentage, write 0.9",
        ),
        ("target: {sparsity: 1}", "recipe:1: target.sparsity: sparsity is a fraction in [0, 1), not 1"),
        ("target: {sparsity: -0.5}", "recipe:1: target.sparsity: sparsity is a fraction in [0, 1), not -0.5"),
        (
            "target: {macs: 50}",
            "recipe:1: target.macs: macs is the fraction kept, in (0, 1]: 50 looks like a percentage, write 0.5",
        ),
        ("target: {params: 0}", "recipe:1: target.params: params is the fraction kept, in (0, 1], not 0"),
        ("target: {sparsity: '0.5'}", "recipe:1: target.sparsity: sparsity should be a valid number, not '0.5'"),
        ("target: {count: 2.5}", "recipe:1: target.count: count is a whole number of at least 0, not 2.5"),
        ("target: {count: true}", "recipe:1: target.count: count should be a valid number, not True"),
        (
            "target: {}",
            "recipe:1: target: a target needs at least one of sparsity, count, threshold, params, macs, memory_bytes, latency_ms",
        ),
        ("seed: 1\n", "recipe:1: target: this key is needed, for example target: {sparsity: 0.5}"),
        ("target: 0.5\nseed: 1", "recipe:1: target: a mapping of keys to values is needed, not 0.5"),
        (
            "target: {sparsity: 0.5, count: 3}",
            "recipe:1: target: sparsity and count exclude each other: each says how much is removed",
        ),
        (GOOD + "\ncriterio: l1", "recipe:2: criterio: unknown key, did you mean criterion?"),
        (GOOD + "\nschema_version: 1", "recipe:2: schema_version: unknown key, did you mean schema?"),
        (GOOD + "\nschema: 2", "recipe:2: schema: input should be 1, not 2"),
        (GOOD + "\nscope: Global", "recipe:2: scope: input should be 'local', 'global' or 'row', not 'Global'"),
        (GOOD + "\nseed: -1", "recipe:2: seed: input should be greater than or equal to 0, not -1"),
        (GOOD + "\ncriterion: [a]", "recipe:2: criterion: write a name, or a mapping with name and its options"),
        (
            GOOD + "\ncriterion: {reduce: mean}",
            "recipe:2: criterion: write a name, or a mapping with name and its options",
        ),
        (GOOD + "\nprotect: head", "recipe:2: protect: input should be a valid tuple, not 'head'"),
        (
            GOOD + "\nrecover:\n- method: tune",
            "recipe:3: recover.0: method must be one of bn_refresh, refit, obs_update, finetune, not 'tune'",
        ),
        (
            GOOD + "\nrecover:\n- batches: 3",
            "recipe:3: recover.0: method must be one of bn_refresh, refit, obs_update, finetune",
        ),
        (GOOD + "\nrecover:\n- method: finetune", "recipe:3: recover.0: give exactly one of epochs and steps"),
        (
            GOOD + "\nrecover:\n- method: finetune\n  steps: 1\n  epochs: 1",
            "recipe:3: recover.0: give exactly one of epochs and steps",
        ),
        (
            GOOD + "\nrecover:\n- method: finetune\n  steps: 1\n  optimizer:\n    learning_rate: 1",
            "recipe:6: recover.0.optimizer.learning_rate: unknown key, known: name, lr, momentum",
        ),
        (
            GOOD + "\nrecover:\n- method: finetune\n  steps: 1\n  optimizer: {name: adam, momentum: 0.9}",
            "recipe:5: recover.0.optimizer: momentum and nesterov belong to sgd, not to adam",
        ),
        (
            GOOD + "\nrecover:\n- method: finetune\n  steps: 1\n  optimizer: {nesterov: true}",
            "recipe:5: recover.0.optimizer: nesterov needs a momentum above 0",
        ),
        (
            GOOD + "\nrecover:\n- method: bn_refresh\n  batch: 3",
            "recipe:4: recover.0.batch: unknown key, did you mean batches?",
        ),
        (
            GOOD + "\ntraining: {method: gradul, steps: 2}",
            "recipe:2: training: method must be one of gradual, slimming, movement, not 'gradul'",
        ),
        (
            GOOD + "\ntraining: {method: gradual, step: 2}",
            "recipe:2: training.step: unknown key, did you mean steps?",
        ),
        (
            GOOD + "\ntraining:\n  method: movement\n  steps: 2\n  optimizer: {learning_rate: 1}",
            "recipe:5: training.optimizer.learning_rate: unknown key, known: name, lr, momentum",
        ),
        (GOOD + "\nmeasure: {latency: 1}", "recipe:2: measure.latency: input should be a valid boolean, not 1"),
        (GOOD + "\nverify: {tolerance: 0}", "recipe:2: verify.tolerance: input should be greater than 0, not 0"),
        (
            GOOD + "\nverify: {dtype: float16}",
            "recipe:2: verify.dtype: input should be 'float32' or 'float64', not 'float16'",
        ),
    ],
)
def test_messages(text, expected):
    assert message(text + "\n").splitlines()[0].startswith(expected)


def test_all_problems_are_shown_at_once(tmp_path):
    (tmp_path / "r.yaml").write_text("# a recipe\n\ntarget:\n  sparcity: 0.5\nseeed: 1\n")
    assert message(tmp_path / "r.yaml") == (
        f"{tmp_path}/r.yaml:4: target.sparcity: unknown key, did you mean sparsity?\n"
        f"{tmp_path}/r.yaml:5: seeed: unknown key, did you mean seed?"
    )


def test_yaml_rules_of_1_2():
    assert load_recipe(GOOD + "\ngranularity: 2:4\n").granularity == "2:4"
    assert load_recipe(GOOD + "\nprotect: [no, on, 012x, 2020-01-01]\n").protect == ("no", "on", "012x", "2020-01-01")
    assert load_recipe("target: {threshold: 1e-3, latency_ms: 1_000.5}\nseed: 0x10").target.threshold == 1e-3
    assert load_recipe("target: {count: 1_000}\nseed: 0o17\n").seed == 15


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["seed=3"], "seed", 3),
        (["seed=3", "seed=3"], "seed", 3),
        ([" seed = 3 "], "seed", 3),
        (["target.sparsity=0.25"], "target.sparsity", 0.25),
        (["target={macs: 0.5}"], "target.macs", 0.5),
        (["granularity=2:4"], "granularity", "2:4"),
        (["granularity={name: block, shape: [4, 4]}"], "granularity", {"name": "block", "shape": [4, 4]}),
        (["criterion=taylor", "criterion.reduce=mean"], "criterion", {"name": "taylor", "reduce": "mean"}),
        (["criterion.p=2"], "criterion", {"name": "magnitude", "p": 2}),
        (["protect=[a.*, 'type:Linear']"], "protect", ("a.*", "type:Linear")),
        (["protect.0=a=b"], "protect", ("a=b",)),
        (["recover.0.method=bn_refresh", "recover.0.batches=7"], "recover.0.batches", 7),
        (
            ["recover=[{method: finetune, epochs: 3}]", "recover.0.epochs=null", "recover.0.steps=9"],
            "recover.0.steps",
            9,
        ),
        (["measure.latency=false"], "measure.latency", False),
    ],
)
def test_overrides(overrides, path, value):
    found = load_recipe(GOOD, overrides)
    for part in path.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set seed: write --set key=value"),
        ("=3", "--set =3: write --set key=value"),
        ("a..b=3", "--set a..b=3: write --set key=value"),
        ("seed.x=3", "--set seed.x=3: seed: input should be a valid integer"),
        ("target.sparsity.x=3", "--set target.sparsity.x=3: target.sparsity is a single value and has no key 'x'"),
        ("recover.1.steps=3", "--set recover.1.steps=3: recover is a list of 0; '1' is no index from 0 to 0"),
        ("recover.-1=3", "--set recover.-1=3: recover: "),
        ("seed=[1", "--set seed=[1:1: not valid YAML"),
        ("seed=!!int 3", "--set seed=!!int 3:1: tags"),
        ("target.sparsity=50", "--set target.sparsity=50: target.sparsity: sparsity is a fraction in [0, 1): 50 looks"),
        ("trget.sparsity=0.5", "--set trget.sparsity=0.5: trget: unknown key, did you mean target?"),
    ],
)
def test_bad_overrides(override, expected):
    assert message(GOOD, override).startswith(expected)


NUMBERS = st.floats(0, 1, exclude_max=True, allow_subnormal=False) | st.integers(0, 0)


@settings(max_examples=100, deadline=None)
@given(sparsity=NUMBERS, seed=st.integers(0, 2**32 - 1), rounds=st.integers(1, 1000), quality=st.booleans())
def test_set_gives_what_the_mapping_gives(sparsity, seed, rounds, quality):
    by_set = load_recipe(
        {},
        [f"target.sparsity={sparsity!r}", f"seed={seed}", f"measure.rounds={rounds}", f"measure.quality={quality}"],
    )
    measure = {"rounds": rounds, "quality": quality}
    assert by_set == load_recipe({"target": {"sparsity": sparsity}, "seed": seed, "measure": measure})


WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_:-]{0,8}", fullmatch=True)
OPTIONS = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True),
    st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    max_size=3,
)
PATTERNS = st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable() and not s.startswith("type:"))


@settings(max_examples=60, deadline=None)
@given(name=WORDS, options=OPTIONS, word=WORDS, protect=st.lists(PATTERNS, max_size=3), lr=st.floats(1e-12, 1e6))
def test_what_is_dumped_is_read_back(name, options, word, protect, lr):
    tune = {"method": "finetune", "steps": 3, "optimizer": {"name": "adamw", "lr": lr}}
    recipe = load_recipe(
        {
            "target": {"macs": 0.5, "latency_ms": lr},
            "criterion": {**options, "name": name},
            "granularity": word,
            "protect": protect,
            "recover": [{"method": "bn_refresh"}, tune],
        }
    )
    text = dump_recipe(recipe)
    assert load_recipe(text) == recipe
    assert dump_recipe(load_recipe(text)) == text


def test_dumped_names_mean_the_same_to_yaml_1_1():
    yaml = pytest.importorskip("yaml")

    text = dump_recipe(load_recipe(GOOD, ["granularity=2:4", "protect=[no, yes, 1e3x]"]))
    other = yaml.safe_load(text)
    assert other["granularity"] == "2:4"
    assert other["protect"] == ["no", "yes", "1e3x"]


def test_bundled_recipes():
    assert bundled() == [
        "block-rows", "channel-half-macs", "distil", "element-90", "gradual-90", "language-model",
        "language-model-layers", "language-model-width", "lottery", "movement-bert", "slimming-70",
        "transformer-heads", "transformer-neurons", "two-four",
    ]  # fmt: skip
    folder = Path(sys.modules["secateur.recipe"].__file__).parent / "bundled"
    for name in bundled():
        assert isinstance(load_recipe(name), Recipe)
        assert (folder / f"{name}.yaml").read_text().startswith("# Choose this")
    assert load_recipe("two-four").granularity == "2:4"
    assert load_recipe("channel-half-macs", ["target.macs=0.25"]).target.given() == {"macs": 0.25}


def test_a_missing_file_suggests_a_bundled_recipe():
    with pytest.raises(FileRefusedError, match="did you mean the bundled recipe channel-half-macs"):
        load_recipe("chanel-half-mac")
    with pytest.raises(FileRefusedError, match="bundled: block-rows, "):
        load_recipe("/nonexistent/r.yaml")


def test_recipes_are_frozen():
    from pydantic import ValidationError

    recipe = load_recipe(GOOD)
    with pytest.raises(ValidationError):
        recipe.seed = 3


def test_the_module_prints_the_schema():
    import json

    run = subprocess.run([sys.executable, "-m", "secateur.recipe"], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)["title"] == "secateur recipe"
    assert run.stderr == ""
