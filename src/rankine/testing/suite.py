"""What every method must do, whatever it computes. A class of checks: subclass it with a `row`
fixture, and a method of another package is held to the same contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankine
from rankine.budget import Uniform
from rankine.discovery import get
from rankine.engine.at_once import solves_at_once
from rankine.engine.run import cast, open_run
from rankine.engine.stage import Stage, WorkSource, needed
from rankine.method import Compressor
from rankine.patch import stored_bits
from rankine.pipeline import Result
from rankine.recipe import Recipe
from rankine.statistics import survey
from rankine.structures import Dense, LowRank
from rankine.testing import models as tiny
from rankine.testing.rows import Row

#: Row → its first run, which most checks look at.
MADE: dict[str, tuple[Result, Path]] = {}


def bf16(model: nn.Module) -> nn.Module:
    """As real checkpoints come: weights in bfloat16, the rotary table in float32."""
    return cast(model, torch.bfloat16)


def compress(row: Row, model: nn.Module, task: Any = None, **more: Any) -> Result:
    """One run without evaluation."""
    asked = {**row.asked, **more}
    return rankine.compress(model, task=task or tiny.tokens(padded=True), evaluate=False, **asked)


def logits(model: nn.Module) -> Tensor:
    """On ids that no calibration saw."""
    with torch.no_grad():
        return model(tiny.ids(3, 12, seed=7), use_cache=False).logits


def tensors(directory: Path) -> dict[str, Tensor]:
    """Of the written file."""
    return load_file(directory / "model.safetensors")


def targeted(result: Result) -> list[Any]:
    """The weights that the run was asked to make smaller."""
    return [w for target in result.stages[-1].targets for w in target.weights]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def compressor(row: Row) -> Compressor:
    """The row's method."""
    method = get(row.method, row.knobs)
    assert isinstance(method, Compressor)
    return method


def same_share(row: Row) -> bool:
    """Does its rule give every target the same share and leave the rest of the budget?"""
    method = compressor(row)
    own_rule = type(method).allocate is not Compressor.allocate
    if own_rule:
        return getattr(method, "allocation", None) == "uniform"
    return isinstance(method.allocator, Uniform)


class MethodChecks:
    """Subclasses provide `row` (a `rows.Row`)."""

    @pytest.fixture
    def made(self, row: Row, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
        """The row on a tied Llama with grouped heads in bfloat16, saved; made once per row."""
        if row.id not in MADE:
            directory = tmp_path_factory.mktemp(row.method) / "saved"
            MADE[row.id] = (result := compress(row, bf16(tiny.llama()))), directory
            rankine.save(result.model, directory, result.patch)
        return MADE[row.id]

    def test_shapes_and_places(self, row: Row, made: tuple[Result, Path]) -> None:
        """Every target stands where it stood, with the same in- and outputs."""
        result, _ = made
        dense = tiny.llama()
        replaced = [w for w in targeted(result) if w.path in result.patch.modules]
        assert replaced
        for weight in replaced:
            module = result.model.get_submodule(weight.path)
            old = dense.get_submodule(weight.path).weight
            assert (module.out_features, module.in_features) == tuple(old.shape)
            if result.patch.modules[weight.path].mergeable:
                assert module.weight.shape == old.shape
        for target in result.stages[-1].targets:
            if row.keep is not None and target.members[0] in result.patch.modules:
                assert stored_bits(result.model, *target.members) < 16 * target.size
        untouched = set(dict(dense.named_parameters())) - {f"{w.path}.weight" for w in replaced}
        if compressor(row).refinement is None:
            for name in untouched:
                assert torch.equal(
                    result.model.get_parameter(name), dense.get_parameter(name).bfloat16()
                ), name
        names = [name for name, _ in result.model.named_parameters()]
        assert "lm_head.weight" not in names, "tied still: named once"

    def test_budget_is_met_on_the_saved_bytes(self, row: Row, made: tuple[Result, Path]) -> None:
        """At most what was asked for, and no target could take a better option of its own."""
        result, directory = made
        saved, targets = tensors(directory), result.stages[-1].targets
        bits = {
            target.id: sum(
                t.numel() * t.element_size() * 8
                for name, t in saved.items()
                if name.startswith(tuple(path + "." for path in target.members))
            )
            for target in targets
        }
        count = sum(target.size for target in targets)
        choices = result.stages[-1].choices
        for target in targets:
            stored, chosen = bits[target.id], choices[target.id]
            if result.patch.modules.get(target.members[0], Dense()) == chosen.structure:
                assert stored == chosen.bits
            else:  # a pivoted form that rounding would have spoiled
                assert stored <= chosen.bits
                assert chosen.structure.pivoted
        measured = sum(bits.values()) / (16 * count)
        assert result.report["budget"]["keep"] == pytest.approx(measured, rel=1e-9)
        if row.keep is None:
            return
        assert measured <= row.keep
        slack = int(row.keep * 16 * count) - sum(choices[target].bits for target in bits)
        for bid in result.stages[-1].bids:
            chosen = choices[bid.target]
            if same_share(row):
                slack = int(row.keep * bid.dense_bits) - chosen.bits
            elif row.probes or row.coarse:
                break  # one share per type, one level for all: coarse on purpose
            better = [o for o in bid.options if chosen.bits < o.bits <= chosen.bits + slack]
            assert not [o for o in better if o.loss < chosen.loss * (1 - 1e-6) - 1e-15], bid.target

    def test_loaded_is_the_same_function(self, made: tuple[Result, Path]) -> None:
        """Bit-identical logits from the directory."""
        result, directory = made
        loaded = rankine.load(directory)
        assert type(loaded) is type(result.model)
        assert next(loaded.parameters()).dtype == torch.bfloat16
        assert torch.equal(logits(loaded), logits(result.model))
        assert bool(torch.isfinite(logits(loaded)).all())

    def test_same_bytes_twice(self, row: Row, made: tuple[Result, Path], tmp_path: Path) -> None:
        """Nothing depends on anything but the recipe, the model and the data."""
        torch.manual_seed(1234)  # whatever state the process is in
        again = compress(row, bf16(tiny.llama()))
        rankine.save(again.model, tmp_path / "again", again.patch)
        first, second = (d / "model.safetensors" for d in (made[1], tmp_path / "again"))
        assert first.read_bytes() == second.read_bytes()

    @pytest.mark.parametrize("stage", ["survey", "solve"])
    def test_a_resumed_run_ends_the_same(
        self, row: Row, stage: str, made: tuple[Result, Path], tmp_path: Path
    ) -> None:
        """Interrupted in the middle, then run again in the same work directory."""
        own_survey = compressor(row).card.needs and not solves_at_once(made[0].stages[-1])
        if stage == "survey" and not own_survey:
            pytest.skip("nothing is measured, or in the walk that solves")
        work = str(tmp_path / "work")
        seen: list[str] = []

        def interrupt(name: str, done: int, total: int) -> None:
            if name == stage and done >= total / 2:
                raise KeyboardInterrupt

        def watch(name: str, done: int, total: int) -> None:
            seen.append(name)

        with pytest.raises(KeyboardInterrupt):
            compress(row, bf16(tiny.llama()), work=work, progress=interrupt)
        resumed = compress(row, bf16(tiny.llama()), work=work, progress=watch)
        tied = {"lm_head.weight", *resumed.patch.tied}
        again = {n: t for n, t in resumed.model.state_dict().items() if n not in tied}
        assert same(again, tensors(made[1]))
        if stage == "solve":
            assert "survey" not in seen  # what was finished is not done again

    def test_biases_conv1d_and_float32(self, row: Row) -> None:
        """GPT-2: transposed weights, a bias on each, one fused matrix."""
        model, dense = tiny.gpt2(), tiny.gpt2()
        # A weight takes 32 bits here, so the smallest sizes are twice as large.
        room = {} if row.keep is None else {"keep": max(row.keep, 0.2)}
        result = compress(row, model, **room)
        assert next(model.parameters()).dtype == torch.float32
        assert bool(torch.isfinite(logits(model)).all())
        centred = getattr(get(row.method, row.knobs), "centred", False)
        refined = compressor(row).refinement is not None
        for weight in targeted(result):
            module, old = (m.get_submodule(weight.path) for m in (model, dense))
            assert tuple(module.bias.shape) == tuple(old.bias.shape)
            if not centred and not refined:
                assert torch.equal(module.bias, old.bias)
        if row.keep is not None:
            assert result.report["budget"]["keep"] <= room["keep"]

    def test_fewer_tokens_than_inputs(self, row: Row) -> None:
        """Rank-deficient moments on both sides."""
        model = bf16(tiny.llama())
        result = compress(row, model, tiny.tokens(2, 4))
        assert bool(torch.isfinite(logits(model)).all())
        for name, tensor in result.patch.tensors.items():
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), name

    def test_full_size_is_the_dense_model(self, row: Row) -> None:
        """A budget that allows the dense weights keeps them: nothing is lost, nothing grows."""
        if row.keep is None or row.probes:
            pytest.skip("the knobs or the probes decide the size")
        model, dense = bf16(tiny.llama()), bf16(tiny.llama())
        result = compress(row, model, keep=1.0)
        assert not result.patch.modules
        assert torch.equal(logits(model), logits(dense))

    def test_full_rank_recovers_the_weight_in_the_methods_own_metric(self, row: Row) -> None:
        """Also where the data is rank-deficient: nothing is lost off the data."""
        method = compressor(row)
        if not isinstance(method.template, LowRank):
            pytest.skip("no low-rank structure")
        pivoted = "pivoted" in row.knobs.get("structures", ())
        with open_run(Recipe.of(**row.asked), tiny.llama(), tiny.tokens(2, 4)) as run:
            stage = Stage(run, method, 0, method.targets(run.anatomy))
            spool: dict[str, Any] = {}
            needs = needed(stage, stage.targets)
            found = survey(run.walk(), needs, spool.get, spool.__setitem__)
            for target in stage.targets[:7]:
                goal = method.goal(target, WorkSource(run), found)
                w_oi = goal.detach().double()
                full = LowRank(min(target.shape), pivoted=pivoted)
                parts = full.encode(w_oi, method.metric(target, found))
                error = (full.decode(parts) - w_oi).abs().max() / w_oi.abs().max()
                assert float(error) < 1e-5, target.id

    def test_choices_are_values_of_the_catalogue(self, made: tuple[Result, Path]) -> None:
        """The report names each target's structure, and the losses are predictions, not noise."""
        result, _ = made
        entries = {e["id"]: e for e in result.report["targets"]}
        for target in result.stages[-1].targets:
            option = result.stages[-1].choices[target.id]
            assert entries[target.id]["structure"] == option.structure.to_json()
            assert option.loss >= 0
            if isinstance(option.structure, Dense):
                assert option.loss == 0
