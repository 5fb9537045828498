"""One command on several ranks: one voice, one outcome, and the same model as on one rank."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forked import Ended, free_port, on_ranks
from rankine import cli
from rankine.checkpoint import Journal

METHODS = ("svd_llm", "auto")  # solved behind each block's survey; reverse walk and live moments


def command(tiny, small, output, method="svd_llm", *more):
    return ["compress", tiny, "--method", method, "--keep", "0.6", "-o", output, *small, *more]


def said(rank):
    """What this rank has printed so far."""
    sys.stdout.flush()
    return Path(sys.stdout.name).read_text()


def launch(place, arguments, before=lambda rank: None, size=2):
    """(exit code, what it printed) of the command on every rank; `before` may spoil one."""

    def work(rank):
        before(rank)
        return cli.run([str(a) for a in arguments]), said(rank)

    return on_ranks(size, place, work)


def dying_in(stage, entry, end):
    """Rank 1 or 0 meets its `end` when it journals its entry number `entry` of a stage."""
    put, left = Journal.put, entry

    @functools.wraps(put)
    def deadly(self, name, *rest):
        nonlocal left
        if name.startswith(stage):
            if left == 0:
                end()
            left -= 1
        put(self, name, *rest)

    Journal.put = deadly


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def contents(output):
    """Bytes of everything but the report (it tells times) and the card that quotes it."""
    return {
        path.name: path.read_bytes()
        for path in sorted(output.iterdir())
        if not path.name.startswith(("report", "README", "SHA256SUMS"))
    }


@pytest.fixture(scope="module", params=METHODS)
def both(request, tiny, small, tmp_path_factory):
    """(method, what one rank wrote, what two wrote, what the two printed)."""
    place = tmp_path_factory.mktemp(request.param)
    assert cli.run([str(a) for a in command(tiny, small, place / "one", request.param)]) == 0
    (code, text), (other, silence) = launch(
        place / "ranks", command(tiny, small, place / "two", request.param)
    )
    assert (code, other, silence) == (0, 0, ""), text
    return request.param, place / "one", place / "two", text


def test_two_ranks_choose_as_one_does(both):
    _, one, two, _ = both
    reports = [json.loads((place / "report.json").read_text()) for place in (one, two)]
    first, second = ([(t["id"], t["structure"], t["bits"]) for t in r["targets"]] for r in reports)
    assert first == second
    rows = [next(row for row in r["rows"] if row["kind"] == "result") for r in reports]
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-5)


def factors(output):
    """Path → (down, up) in float64, each component's largest entry in `down` positive."""
    tensors = load_file(output / "model.safetensors")
    found = {}
    for name in tensors:
        if name.endswith(".down.weight"):
            path = name.removesuffix(".down.weight")
            down_ri, up_or = tensors[name].double(), tensors[f"{path}.up.weight"].double()
            sign_r = down_ri.gather(1, down_ri.abs().argmax(1, keepdim=True)).sign()
            found[path] = (down_ri * sign_r, up_or * sign_r.mT)
    return found


def test_two_ranks_make_the_same_factors(both):
    _, one, two, _ = both
    first, second = factors(one), factors(two)
    assert first.keys() == second.keys() != set()
    for path, (down, up) in first.items():
        for mine, other in [(down, second[path][0]), (up, second[path][1])]:
            assert float((mine - other).abs().max()) <= 1e-5 * float(mine.abs().max()), path
        product, same = up @ down, second[path][1] @ second[path][0]
        assert float((product - same).norm()) <= 1e-5 * float(product.norm()), path


def test_nothing_is_left_and_one_voice_is_heard(both):
    _, one, two, text = both
    assert {path.name for path in two.parent.iterdir()} == {"one", "two", "ranks"}
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert text.count(f"wrote {two}") == 1


#: Where a rank dies: in its own or the common work, in the first or a later stage.
DEATHS = {
    "svd_llm": [("solve", 2, 1), ("solve", 0, 0)],
    "auto": [("survey", 1, 0), ("solve", 1, 1)],
}


@pytest.mark.parametrize("death", [0, 1])
def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(both, tiny, small, tmp_path, death):
    method, _, two, _ = both
    stage, entry, victim = DEATHS[method][death]
    asked = command(tiny, small, tmp_path / "out", method, "--evaluate", "no", "--timeout", "120")

    def before(rank):
        if rank == victim:
            dying_in(stage, entry, killed)

    ends = launch(tmp_path / "ranks", asked, before)
    assert ends[victim].code == -signal.SIGKILL
    code, text = ends[1 - victim]
    *_, sentence = text.strip().splitlines()
    assert code == 1
    assert f"rank {victim} (process " in sentence
    assert sentence.count("rankine: ") == 1
    assert "torchrun --nproc-per-node 2 -m rankine compress " in sentence
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rankine-work" / "entries").exists()
    assert [code for code, _ in launch(tmp_path / "ranks", asked)] == [0, 0]
    assert contents(tmp_path / "out") == contents(two)
    assert not (tmp_path / "out.rankine-work").exists()


def test_a_mistake_of_one_rank_is_told_by_the_first(tiny, small, tmp_path):
    from rankine.errors import UserError

    def refuse():
        raise UserError("expected x, found y")

    asked = command(tiny, small, tmp_path / "out", "svd_llm", "--evaluate", "no")
    (code, text), (other, silence) = launch(
        tmp_path / "ranks", asked, lambda rank: rank and dying_in("solve", 0, refuse)
    )
    assert (code, other, silence) == (2, 2, "")
    assert text.strip().splitlines()[-1] == "rankine: rank 1 ended: expected x, found y"
    assert "Traceback" not in text


def test_a_result_that_is_not_accepted(tiny, small, tmp_path):
    asked = command(tiny, small, tmp_path / "out", "svd", "--accept", "perplexity<=1")
    (code, text), (other, silence) = launch(tmp_path / "ranks", asked)
    assert (code, other, silence) == (3, 3, "")
    assert "expected perplexity <= 1" in text.strip().splitlines()[-1]
    assert (tmp_path / "out.report").exists()
    assert not (tmp_path / "out.rankine-work").exists()


def test_another_number_of_ranks_is_another_run(tiny, small, tmp_path, capsys):
    asked = command(tiny, small, tmp_path / "out", "svd", "--evaluate", "no")
    ends = launch(tmp_path / "ranks", asked, lambda rank: rank and dying_in("solve", 0, killed))
    assert isinstance(ends[1], Ended)
    assert cli.run([str(a) for a in asked]) == 2
    assert "found that ranks changed since" in capsys.readouterr().err


def test_ranks_with_other_data_are_refused(tiny, small, tmp_path):
    asked = command(tiny, small, tmp_path / "out", "svd_llm", "--evaluate", "no")
    place = asked.index("--tokens") + 1

    def work(rank):
        asked[place] = "4x16" if rank else "4x32"
        return cli.run([str(a) for a in asked]), said(rank)

    (code, text), (other, silence) = on_ranks(2, tmp_path / "ranks", work)
    assert (code, other, silence) == (2, 2, "")
    assert "found other data and recipe on rank 1" in text


def test_other_verbs_want_one_process(rankine, tiny, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    ran = rankine("inspect", tiny)
    assert (ran.code, ran.out) == (2, "")
    assert "start it without torchrun" in ran.sentence
    monkeypatch.setenv("RANK", "1")
    assert rankine("inspect", tiny).err == ""


@pytest.mark.slow
@pytest.mark.process
def test_torchrun_itself(tiny, small, tmp_path):
    """Started as the documentation says; one of its ranks is killed from outside."""
    asked = command(tiny, small, tmp_path / "out", "svd_llm", "--evaluate", "no")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--master-port", free_port(), "-m", "rankine", *asked]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert (tmp_path / "out" / "config.json").exists()
