"""Studies as YAML: what a file means, that it survives the way out and in, and what is refused."""

from pathlib import Path

import pytest

import dpfl
from dpfl.study import StudyConfig, clipping, round_frequency, value_range

YAML = """
experiment:
  data: {source: scores.csv, client: school, label: score, label_bins: 3}
  model: softmax
  local: {learning_rate: 0.3, batch_size: 5, steps: 3}
  mechanism: {name: gaussian, clip_norm: 0.5}
  privacy: {epsilon: none, delta: 1e-2}
  sampler: {name: poisson, cohort: 10}
  rounds: 6
grid:
  privacy.epsilon: [2, none]
  clipping: {clip_norms: {low: 0.25, high: 1, count: 3}, quantiles: [0.5], start: 0.3}
  round_frequency: {rounds: [2, 6], local_work: 6}
ceiling: true
seeds: [5, 7]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [f"{row % 40},{(7 * row) % 11},{row % 13 + row / 1000}" for row in range(400)]
    (tmp_path / "scores.csv").write_text("\n".join(["school,age,score", *rows]))
    (tmp_path / "study.yaml").write_text(YAML)
    return tmp_path / "study.yaml"


def test_a_file_says_which_experiments_there_are(file: Path) -> None:
    study = StudyConfig.from_yaml(file).study()
    assert study.seeds == (5, 7)
    assert len(study.experiments) == 2 * 4 * 2 + 2
    first, last = study.experiments[0], study.experiments[-1]
    assert first.data.num_classes == 3
    assert first.data.num_clients == 40
    assert any("quantiles" in sentence for sentence in first.data.assumptions)
    assert (first.privacy.epsilon, first.privacy.delta, first.rounds, first.local.steps) == (2, 1e-2, 2, 3)
    clips = [(one.mechanism.name, one.mechanism.clip_norm) for one in study.experiments[:8:2]]
    assert clips == [("gaussian", 0.25), ("gaussian", 0.5), ("gaussian", 1.0), ("adaptive_clipping", 0.3)]
    assert (last.mechanism.name, last.rounds, last.local.steps) == ("none", 6, 1)


def test_what_is_written_reads_the_same(file: Path) -> None:
    config = StudyConfig.from_yaml(file)
    config.to_yaml(file.parent / "again.yaml")
    again = StudyConfig.from_yaml(file.parent / "again.yaml")
    assert again.model_dump() == config.model_dump()
    assert again.study().run_ids == config.study().run_ids


def test_points_rows_and_axes_multiply() -> None:
    config = StudyConfig(
        experiment={
            "data": "digits",
            "privacy": {"epsilon": 4, "delta": 1e-3},
            "sampler": {"name": "poisson", "cohort": 30},
            "rounds": 3,
        },
        points=[{"model": "softmax"}, {"model": "mlp", "local.epochs": 2}],
        zip={"rounds": [2, 5], "sampler.cohort": [60, 30]},
        grid={"privacy.epsilon": [1, "none"]},
    )
    found = [
        (one.model, one.local.epochs, one.rounds, one.sampler.cohort, one.privacy.epsilon)
        for one in config.study().experiments
    ]
    expected = [
        (model, epochs, *row, epsilon)
        for model, epochs in (("softmax", 1), ("mlp", 2))
        for row in ((2, 60), (5, 30))
        for epsilon in (1, None)
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("grid:", "gird:", "'gird' is not a setting of StudyConfig: did you mean 'grid'"),
        ("  rounds: 6", "  round: 6", "'round' is not a setting of Experiment: did you mean 'rounds'"),
        ("clip_norm: 0.5", "clip_nrom: 0.5", "'clip_nrom' is not a setting of Gaussian: did you mean 'clip_norm'"),
        ("batch_size: 5", "batchsize: 5", "'batchsize' is not a setting of ClientTraining: did you mean 'batch_size'"),
        ("label: score", "lable: score", "takes no option 'lable'"),
        ("privacy.epsilon: [", "privacy.epsilom: [", "did you mean 'epsilon'"),
        ("[2, none]", "2", "the axis privacy.epsilon must be a list of values or a range"),
        ("local_work: 6", "local_work: 7", "7 local steps cannot be split evenly into 2 rounds"),
        ("low: 0.25", "low: 0", "low end below the high one, above 0"),
        ("name: gaussian", "name: gausian", "mechanism must be given by"),
        ("source: scores.csv", "source: score.csv", "there is no file score.csv"),
        ("label_bins: 3", "label_bins: 1", "at least 2"),
        ("experiment:", "experiment: [", "is not a valid YAML file"),
        (YAML, "- 3", "is not a study: give it the settings experiment, grid"),
        ("rounds: 6\n", "rounds: many\n", "rounds should be a valid integer"),
        ("experiment:", "seeds: 3\nexperiment:", 'found duplicate key "seeds".* in line 16'),
        (
            "privacy.epsilon: [",
            "epsilon: [",
            "'epsilon' is not a setting of Experiment: did you mean 'privacy.epsilon'",
        ),
        ("  clipping:", "  cliping:", "'cliping' is not an axis: did you mean 'clipping'"),
        ("{low: 0.25, high: 1, count: 3}", "{low: 0.25, high: 1}", "Range lacks 'count': give it a value"),
        ("count: 3}", "count: 3, scale: lgo}", "scale should be 'log' or 'linear', but it was 'lgo'"),
        ("clipping: {", "clipping: {} #", "the axis clipping has no values"),
        ("rounds: [2, 6]", "rounds: []", "rounds needs at least 1 value"),
        ("seeds: [5, 7]", "seeds: three", "^seeds should be a valid integer"),
        ("mechanism: {name: gaussian, clip_norm: 0.5}", "mechanism: gaussian", "a mapping of its name and settings"),
        ("grid:", "grid:\n  rounds: [3]", "the setting rounds varies in two places"),
        ("grid:", "grid:\n  mechanism.clip_norm: [3]", "the setting mechanism.clip_norm varies in two places"),
        ("grid:", "zip: {privacy.epsilon: [1]}\ngrid:", "the setting privacy.epsilon varies in two places"),
        ("grid:", "points: [{local.steps: 1}]\ngrid:", "the setting local.steps varies in two places"),
        ("grid:", "zip: {model: []}\ngrid:", "the list of model in zip is empty"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(file: Path, old: str, new: str, complaint: str) -> None:
    assert old in YAML
    file.write_text(YAML.replace(old, new, 1))
    with pytest.raises(dpfl.InputError, match=complaint) as refused:
        StudyConfig.from_yaml(file).study()
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(dpfl.InputError, match="cannot be read"):
        StudyConfig.from_yaml(tmp_path / "none.yaml")


def test_axes_in_python() -> None:
    assert value_range(0.1, 1.6, 5) == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert value_range(1, 3, 3, "linear") == [1, 2, 3]
    assert round_frequency([2, 6], 6) == {("rounds", "local.steps"): [(2, 3), (6, 1)]}
    fixed, adaptive = clipping([0.5], [0.3])["mechanism"]
    assert (fixed.clip_norm, adaptive.quantile) == (0.5, 0.3)
    base = StudyConfig(
        experiment={"data": "digits", "privacy": {"epsilon": 1}, "sampler": {"name": "everyone"}, "rounds": 3}
    ).study()
    with pytest.raises(dpfl.InputError, match="the setting rounds is on two axes"):
        dpfl.Study(base.experiments, {"rounds": [1], **round_frequency([2, 6], 6)})
    for low, high, count in ((1, 1, 3), (1, 2, 1), (-1, 2, 3)):
        with pytest.raises(dpfl.InputError, match="range needs"):
            value_range(low, high, count)
