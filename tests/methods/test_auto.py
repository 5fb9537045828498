"""auto: two-sided metric, anchored solve, knapsack, pivoted storage, refinement."""

import pytest
import torch
from fitting import Layer, correlated, normal

import rankine
import tiny_models as tiny
from rankine.budget import total_bits, total_loss
from rankine.errors import UserError
from rankine.linalg.anchor import Cross, anchored_goal
from rankine.method import get
from rankine.patch import stored_bits
from rankine.structures import Dense, LowRank
from rankine.testing.suite import bf16

X, G = correlated(300, 6), correlated(300, 8, seed=3)
SEEN = X @ (torch.eye(6).double() + 0.2 * normal(6, 6, seed=4)) + 0.1 * normal(300, 6, seed=5)
LAYER = Layer(normal(8, 6), X, G, seen_ni=SEEN)
BARE = {"shrink_in": 0.0, "shrink_out": 0.0}


def compress(keep=0.5, model=None, **knobs):
    model = bf16(tiny.llama()) if model is None else model
    task = tiny.tokens(padded=True)
    return rankine.compress(
        model, method="auto", set=knobs, keep=keep, task=task, evaluate=False, seed=0
    )


def predicted(result):
    stage = result.stages[-1]
    return total_loss(stage.bids, stage.choices)


# -- the solve -----
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_fit_is_the_best_for_the_anchored_goal_in_the_two_sided_norm(rank):
    method = get("auto", BARE)
    approx, patch = LAYER.fitted(method, rank)
    c, h = X.T @ SEEN / 300, SEEN.T @ SEEN / 300
    goal = anchored_goal(LAYER.w_oi, Cross(c), h, method.ridge)
    assert torch.allclose(method.goal(LAYER.target, LAYER, LAYER), goal)
    g = G.T @ G / 300

    def loss(matrix):
        return 0.5 * float(((goal - matrix).T @ g @ (goal - matrix) @ h).trace())

    b, a = patch.tensors["w.up.weight"], patch.tensors["w.down.weight"]
    for seed in range(10):
        for size in (1e-3, 0.3):
            other = (b + size * normal(8, rank, seed=seed)) @ (
                a + size * normal(rank, 6, seed=seed)
            )
            assert loss(other) > loss(approx)


def test_without_anchoring_it_is_kfac_svd():
    layer = Layer(LAYER.w_oi, X, G)
    ours, _ = layer.fitted(get("auto", {"anchored": False, **BARE}), 3)
    theirs, _ = layer.fitted(get("kfac_svd", BARE), 3)
    assert torch.allclose(ours, theirs, atol=1e-9)
    assert get("auto", {"anchored": False}).stream == "dense"


def test_solved_by_inputs_it_is_anchored_svd():
    ours, _ = LAYER.fitted(get("auto", {"solve": "inputs", **BARE}), 3)
    theirs, _ = LAYER.fitted(get("anchored_svd", {"ridge": get("auto").ridge}), 3)
    assert torch.allclose(ours, theirs, atol=1e-8)


# -- the budget -----
def test_the_knapsack_predicts_less_loss_than_uniform_at_the_same_bits():
    ours, plain = compress(0.4), compress(0.4, allocation="uniform")
    assert predicted(ours) < predicted(plain)
    for result in (ours, plain):
        dense = sum(bid.dense_bits for bid in result.stages[-1].bids)
        assert total_bits(result.stages[-1].choices) <= 0.4 * dense


def test_all_structures_predict_at_most_the_loss_of_one():
    both = predicted(compress(0.4, structures=("low_rank", "pivoted")))
    assert both <= predicted(compress(0.4)) * (1 + 1e-9)
    assert both <= predicted(compress(0.4, structures=("pivoted",))) * (1 + 1e-9)


# -- pivoted storage -----
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_pivoted_is_the_same_matrix_in_fewer_bits(rank):
    method = get("auto", BARE)
    plain, _ = LAYER.fitted(method, LowRank(rank))
    pivoted, patch = LAYER.fitted(method, LowRank(rank, pivoted=True))
    assert torch.allclose(pivoted, plain, atol=1e-9)
    saved = LowRank(rank).bits((8, 6), torch.float64) - patch.bits()
    assert saved == 64 * rank**2 - 32 * rank


def test_pivoted_layers_compute_what_the_two_factors_compute():
    plain, pivoted = (
        compress(0.5, tiny.llama(), structures=(form,), allocation="uniform", anchored=False)
        for form in ("low_rank", "pivoted")
    )
    compared = 0
    x = torch.randn(5, 32, generator=tiny.seeded(0))
    for path, structure in pivoted.patch.modules.items():
        other = plain.patch.modules.get(path)
        if not structure.pivoted or other is None:
            continue
        ours, theirs = (r.model.get_submodule(path) for r in (pivoted, plain))
        assert structure.rank >= other.rank  # more fits into the same bits
        inputs = x if ours.in_features == 32 else torch.randn(5, ours.in_features)
        with torch.no_grad():
            dense = tiny.llama().get_submodule(path)(inputs)
            errors = [(m(inputs) - dense).norm() for m in (ours, theirs)]
        assert errors[0] <= errors[1] * 1.3
        with torch.enable_grad():  # the training form
            assert torch.allclose(ours(inputs), ours(inputs).detach(), atol=1e-5)
        compared += 1
    assert compared > 5


WIDE = Layer(normal(64, 48), correlated(900, 48), normal(900, 64))


def stored_loss(layer, structure, dtype):
    """The predicted loss of what is really stored."""
    metric = get("auto").metric(layer.target, layer)
    parts = structure.encode(layer.w_oi, metric)
    rounded = {n: t.to(dtype).double() if t.is_floating_point() else t for n, t in parts.items()}
    return float(metric.loss(layer.w_oi, structure.decode(rounded)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("decay", [0.0, 2.0, 5.0])
def test_no_pivoted_size_is_offered_where_rounding_is_felt(dtype, decay):
    """More than one per cent of the target's loss; nearly lossless sizes in short dtypes."""
    spectrum = torch.logspace(0, -decay, 48).double()
    layer = Layer(normal(64, 48) * spectrum, WIDE.x_ni, WIDE.g_no)
    method = get("auto", {"structures": ("pivoted",)})
    bid = method.bid(layer.target, layer.w_oi, method.metric(layer.target, layer), dtype)
    offered = {o.structure.rank: o.loss for o in bid.options if not isinstance(o.structure, Dense)}
    assert set(range(1, 5 if decay else 24)) <= set(offered)
    for rank in sorted(offered)[-1 :: -max(1, len(offered) // 6)]:
        with_rounding = stored_loss(layer, LowRank(rank, pivoted=True), dtype)
        assert with_rounding <= 1.01 * stored_loss(layer, LowRank(rank), dtype)
    if dtype == torch.bfloat16 and decay:
        assert max(offered) < 47


def test_a_fit_that_rounding_spoils_takes_the_better_of_both_forms():
    method, metric = get("auto"), get("auto").metric(WIDE.target, WIDE)
    for rank in (4, 30, 46, 48):
        choice = LowRank(rank, pivoted=True)
        patch = method.fit(WIDE.target, choice, WIDE.w_oi, metric, torch.bfloat16)
        (standing,) = patch.modules.values()
        bits = choice.bits((64, 48), torch.bfloat16)
        assert patch.bits() <= bits
        plain = max(r for r in range(1, 49) if LowRank(r).bits((64, 48), torch.bfloat16) <= bits)
        forms = (choice, LowRank(plain))
        best = min(stored_loss(WIDE, form, torch.bfloat16) for form in forms)
        assert stored_loss(WIDE, standing, torch.bfloat16) <= 1.01 * best


# -- refinement -----
def test_refinement_lowers_the_error_of_each_blocks_output():
    model, task = tiny.llama(), tiny.tokens(8, 16)
    dense = tiny.llama()
    results = {
        refine: rankine.compress(
            tiny.llama(),
            method="auto",
            set={"refine": refine, "epochs": 15},
            keep=0.6,
            task=task,
            evaluate=False,
        )
        for refine in (False, True)
    }

    def error(model):
        total = 0.0
        for batch in task.batches("calibration"):
            with torch.no_grad():
                outs = [m.model(batch["input_ids"]).last_hidden_state for m in (model, dense)]
            total += float((outs[0] - outs[1]).square().sum())
        return total

    assert error(results[True].model) < 0.9 * error(results[False].model)
    assert [o.bits for o in results[True].stages[-1].choices.values()] == [
        o.bits for o in results[False].stages[-1].choices.values()
    ]
    untouched = model.model.norm.weight  # nothing outside the blocks is trained
    assert torch.equal(results[True].model.model.norm.weight, untouched)
    assert all(p.grad is None for p in results[True].model.parameters())


@pytest.mark.parametrize("stop", [5, 7, 9, 12])
def test_refinement_resumes_before_and_behind_a_refined_block(stop, tmp_path):
    """Seven targets per block: the second block starts from the first one's journalled end."""

    def interrupt(stage, done, total):
        if stage == "solve" and done >= stop:
            raise KeyboardInterrupt

    asked = {"method": "auto", "set": {"refine": True, "epochs": 2}, "keep": 0.2, "evaluate": False}
    asked |= {"task": tiny.tokens(), "work": str(tmp_path / "work")}
    with pytest.raises(KeyboardInterrupt):
        rankine.compress(bf16(tiny.llama()), progress=interrupt, **asked)
    resumed = rankine.compress(bf16(tiny.llama()), **asked)
    whole = rankine.compress(bf16(tiny.llama()), **{**asked, "work": str(tmp_path / "other")})
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_refined_blocks_keep_their_bits():
    result = compress(0.5, refine=True, epochs=1)
    for target in result.stages[-1].targets:
        option = result.stages[-1].choices[target.id]
        if not isinstance(option.structure, Dense):
            assert stored_bits(result.model, target.weights[0].path) == option.bits


@pytest.mark.parametrize(
    ("knobs", "names"),
    [
        ({"structures": ("sparse",)}, "pivoted"),
        ({"structures": ()}, "low_rank"),
        ({"solve": "outputs"}, "two_sided"),
        ({"allocation": "energy"}, "knapsack"),
    ],
)
def test_unknown_knobs_name_what_is_known(knobs, names):
    with pytest.raises(UserError, match=names):
        get("auto", knobs)
