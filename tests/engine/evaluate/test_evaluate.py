"""The command that scores a policy: intervals over prompts, and two models compared."""

import json
import runpy
import statistics
import sys
import threading

import numpy as np
import pytest

from engine.evaluate import __main__ as evaluate_command
from engine.evaluate.__main__ import main, score_table
from engine.prompts.files import load_prompts
from engine.settings.errors import UserError, run_command
from engine.tiny.prompts import write_rows
from engine.weights.read import TINY

EXPERTS = ["hps", "gdino", "git", "orm"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two prompts of three task types."""
    rows = load_prompts("tiny:heldout")
    kinds = ("color", "spatial", "riddle")
    few = [row for kind in kinds for row in [r for r in rows if r["task_type"] == kind][:2]]
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    write_rows(path, few)
    return str(path)


@pytest.fixture(scope="module")
def compared(prompts, tmp_path_factory):
    """The embedded model at two guidance weights, as two models: the second has its own default."""
    folder = tmp_path_factory.mktemp("models")
    other = folder / "other"
    other.mkdir()
    for file in TINY.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "guidance_scale": 6.0}))
    out = folder / "out.json"
    main(["--prompts", prompts, "--compare", str(other), "--out", str(out)])
    return json.loads(out.read_text())


def test_means_are_those_of_the_records(compared):
    summary, rows = compared["summary"], compared["rows"]
    assert len(rows) == 12 and summary["scored_by"] == "judge" and summary["cfg_weight"] == 1.5
    assert set(summary["intervals"]) == {"judge", "reward", *EXPERTS}
    for name, read in {
        "judge": lambda r: r["score"],
        "reward": lambda r: r["reward"],
        **{e: (lambda r, e=e: r["rewards"][e]) for e in EXPERTS},
    }.items():
        found = summary["intervals"][name]
        assert found["all"]["mean"] == pytest.approx(statistics.fmean(map(read, rows)))
        assert found["all"]["prompts"] == 6
        assert found["all"]["low"] <= found["all"]["mean"] <= found["all"]["high"]
        assert set(found["by_task"]) == {"color", "spatial", "riddle"}
        for task, interval in found["by_task"].items():
            own = [read(r) for r in rows if r["task_type"] == task]
            assert interval["mean"] == pytest.approx(statistics.fmean(own))
            assert interval["prompts"] == 2
    assert summary["mean"] == pytest.approx(summary["intervals"]["judge"]["task_mean"]["mean"])
    assert summary["rewards"] == pytest.approx(
        {e: summary["intervals"][e]["all"]["mean"] for e in EXPERTS}
    )


def test_intervals_are_over_prompts_not_pictures(compared):
    """Of two prompts a bootstrap mean is the one, the other, or half-way: nothing in between."""
    rows = [r for r in compared["rows"] if r["task_type"] == "color"]
    per_prompt = sorted(statistics.fmean(r["reward"] for r in rows[i : i + 2]) for i in (0, 2))
    found = compared["summary"]["intervals"]["reward"]["by_task"]["color"]
    assert [found["low"], found["high"]] == pytest.approx(per_prompt)


def test_two_models_are_compared_prompt_by_prompt(compared):
    summary = compared["summary"]
    other = summary["compare"]
    assert other["cfg_weight"] == 6.0 and other["model"].endswith("other")
    assert [r["prompt"] for r in compared["compare_rows"]] == [
        r["prompt"] for r in compared["rows"]
    ]
    # The same noise: at the same guidance weight the plans would be, and are, the same.
    assert [r["plan"] for r in compared["compare_rows"]] == [r["plan"] for r in compared["rows"]]
    for name, found in summary["difference"].items():
        own, others = summary["intervals"][name], other["intervals"][name]
        assert found["all"]["mean"] == pytest.approx(own["all"]["mean"] - others["all"]["mean"])
        for task, interval in found["by_task"].items():
            gap = own["by_task"][task]["mean"] - others["by_task"][task]["mean"]
            assert interval["mean"] == pytest.approx(gap, abs=1e-9)
    # Pairing: the interval of the difference is that of the differences.
    ours = score_table(compared["rows"], 2)["gdino"]
    theirs = score_table(compared["compare_rows"], 2)["gdino"]
    found = summary["difference"]["gdino"]["all"]
    assert (ours - theirs).min() <= found["low"] <= found["high"] <= (ours - theirs).max()


def test_a_model_does_not_differ_from_itself(prompts, capsys):
    main(["--prompts", prompts, "--compare", "tiny", "--num_generations", "1", "--no_cot",
          "--reward_funcs", "gdino", "hps"])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert set(report["difference"]) == {"judge", "reward", "gdino", "hps"}
    for found in report["difference"].values():
        for interval in (found["all"], found["task_mean"], *found["by_task"].values()):
            assert interval["mean"] == interval["low"] == interval["high"] == 0


def test_pictures_of_a_prompt_are_averaged_first():
    records = [
        {"reward": r, "score": s, "scored_by": "judge", "rewards": {"gdino": r}}
        for r, s in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.5, 1.0))
    ]
    table = score_table(records, 2)
    assert list(table) == ["judge", "reward", "gdino"]
    np.testing.assert_allclose(table["reward"], [0.5, 0.5])
    np.testing.assert_allclose(table["judge"], [0.5, 0.75])
    without = [{**record, "scored_by": "experts"} for record in records]
    assert list(score_table(without, 4)) == ["reward", "gdino"]


BAD = {
    "unknown expert": (["--reward_funcs", "gdinoo"], "gdino"),
    "expert twice": (["--reward_funcs", "hps", "hps"], "reward_funcs"),
    "no model to compare": (["--compare", "{tmp}/none"], "none"),
    "no prompts": (["--prompts", "{tmp}/none.txt"], "none.txt"),
    "no such checkpoint": (["--hps_ckpt_path", "{tmp}/x.pt"], "--hps_ckpt_path"),
    "too long": (["--max_prompt_length", "1"], "max_prompt_length"),
    "no device": (["--device", "gpu"], "device must be auto"),
    "absent device": (["--device", "cuda:99"], "--device cuda:99"),
    "absent device of the experts": (["--reward_device", "cuda:99"], "--reward_device cuda:99"),
    "offload from the CPU": (["--reward_offload", "--device", "cpu"], "--reward_offload"),
    "too few weights": (["--reward_weights", "1", "2"], "reward_weights must be 4"),
    "words of another world": (["--prompts", "{tmp}/p.jsonl"], "tiny"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a giraffe", "nouns": ["giraffe"]}')
    flags, named = BAD[case]
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    assert run_command(main) == 2
    shown = capsys.readouterr()
    (line,) = [x for x in shown.err.splitlines() if "images/s" not in x]
    assert line.startswith("error: ") and named in line, line
    assert shown.out == ""


def test_weights_and_the_pipeline_are_those_of_training(prompts, capsys):
    main(["--prompts", prompts, "--reward_funcs", "gdino", "hps", "--reward_weights", "3", "1",
          "--reward_device", "cpu", "--reward_timeout", "100"])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    means = report["rewards"]
    assert means["gdino"] != means["hps"]
    assert report["reward"] == pytest.approx((3 * means["gdino"] + means["hps"]) / 4)
    assert not [t for t in threading.enumerate() if t.name == "rewards"]


def test_the_other_model_is_looked_at_before_the_first_is_scored(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_command, "load_policy", None)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        main(["--prompts", prompts, "--compare", str(tmp_path / "none")])


@pytest.mark.parametrize("module, flag", [("evaluate", "--compare"), ("generate", "--layout")])
def test_the_modules_themselves_are_the_commands(module, flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, f"engine.{module}")  # else runpy warns of a second copy
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"engine.{module}", run_name="__main__")
    assert stopped.value.code == 0 and flag in capsys.readouterr().out
