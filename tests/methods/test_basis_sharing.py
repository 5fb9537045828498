"""Basis sharing: the optimum of the stack, one basis on disk, and what it is fitted to."""

import copy

import pytest
import torch
from fitting import correlated, moment, normal, truncated
from safetensors.torch import load_file

import rankine
import tiny_models as tiny
from rankine.anatomy import Target, Weight, describe
from rankine.errors import UserError
from rankine.method import get
from rankine.metric import Gram, Metric
from rankine.patch import stored_bits
from rankine.structures import Dense, LowRank

METHOD = get("basis_sharing")


class Group:
    """Layers side by side: source and evidence of their target."""

    def __init__(self, *shapes):
        self.w = {str(n): normal(*shape, seed=n) for n, shape in enumerate(shapes)}
        tokens = {n: 300 - 100 * int(n) for n in self.w}
        self.x = {n: correlated(tokens[n], shapes[0][1], seed=7 + int(n)) for n in self.w}

    @property
    def target(self):
        shapes = {n: tuple(w.shape) for n, w in self.w.items()}
        weights = (Weight(n, "q", int(n), shape, "linear", n) for n, shape in shapes.items())
        return Target(tuple(weights), "group")

    def weight(self, weight):
        return self.w[weight.path]

    def inputs(self, weight):
        return moment(self.x[weight.reads])

    def fitted(self, rank):
        goal = METHOD.goal(self.target, self, self)
        metric = METHOD.metric(self.target, self)
        return METHOD.fit(self.target, LowRank(rank), goal, metric, torch.float64)


TWO = Group((8, 6), (8, 6))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_stack_is_cut_where_eckart_and_young_cut_it(rank):
    """In the metric of Σ XᵀX over the layers, as the paper whitens."""
    patch = TWO.fitted(rank)
    gram = sum(x.T @ x for x in TWO.x.values())
    root = torch.linalg.cholesky(gram)
    stack = torch.cat(list(TWO.w.values()))
    wanted = truncated(stack @ root, rank) @ torch.linalg.inv(root)
    down = patch.tensors["0.down.weight"]
    for n, rows in (("0", wanted[:8]), ("1", wanted[8:])):
        assert torch.allclose(patch.tensors[f"{n}.up.weight"] @ down, rows, atol=1e-8)
    assert patch.tied == {"1.down.weight": "0.down.weight"}


def test_losses_and_bits_are_those_of_the_stack():
    goal = METHOD.goal(TWO.target, TWO, TWO)
    metric = METHOD.metric(TWO.target, TWO)
    bid = METHOD.bid(TWO.target, goal, metric, torch.float64)
    assert bid.members == ("0", "1")
    assert bid.dense_bits == 2 * 8 * 6 * 16
    assert bid.options[-1].structure == Dense()
    total = sum(len(x) for x in TWO.x.values())
    for option in bid.options[:-1]:
        rank = option.structure.rank
        patch = TWO.fitted(rank)
        assert option.bits == patch.bits() == rank * (6 + 8 + 8) * 64
        # Against every layer's inputs: the paper's objective.
        error = 0.0
        for n, w in TWO.w.items():
            rest = w - patch.tensors[f"{n}.up.weight"] @ patch.tensors["0.down.weight"]
            error += sum(float((x @ rest.T).square().sum()) for x in TWO.x.values())
        assert option.loss == pytest.approx(error / total, rel=1e-6, abs=1e-12)


def test_grouped_heads_may_have_more_directions_than_outputs():
    """Two k projections with few rows: the basis outgrows each of them."""
    narrow = Group((4, 16), (4, 16))
    patch = narrow.fitted(6)
    down = patch.tensors["0.down.weight"]
    assert down.shape == (6, 16)
    model = torch.nn.ModuleDict({n: torch.nn.Linear(16, 4, bias=False) for n in ("0", "1")})
    patch.apply(model)
    x = normal(5, 16, seed=3)
    for n in ("0", "1"):
        want = x @ (patch.tensors[f"{n}.up.weight"] @ down).T
        assert torch.allclose(model[n](x), want)
    assert model["0"].down.weight is model["1"].down.weight
    assert stored_bits(model, "0", "1") == patch.bits()


def test_equal_layers_share_for_free():
    """A basis of two copies of one layer is that layer's own: half the bits of two fits."""
    same = Group((8, 6), (8, 6))
    same.w["1"] = same.w["0"]
    apart = LowRank(3).encode(same.w["0"], METHOD.metric(same.target, same))
    patch = same.fitted(3)
    alone = apart["up.weight"] @ apart["down.weight"]
    together = patch.tensors["1.up.weight"] @ patch.tensors["0.down.weight"]
    assert torch.allclose(alone, together, atol=1e-8)


def test_which_weights_share():
    """The paper's roles in blocks (0, 1), (2, 3), and the rest; o and down stay by themselves."""
    anatomy = describe(tiny.llama(num_hidden_layers=5))
    targets = METHOD.targets(anatomy)
    groups = {t.weights[0].role: [] for t in targets}
    for target in targets:
        groups[target.weights[0].role].append([w.block for w in target.weights])
        assert target.kind == ("group" if len(target.weights) > 1 else "weight")
    for role in ("q", "k", "v", "gate", "up"):
        assert groups[role] == [[0, 1], [2, 3], [4]]
    for role in ("o", "down"):
        assert groups[role] == [[n] for n in range(5)]
    three = get("basis_sharing", {"group": 3, "share": "o"}).targets(anatomy)
    assert [len(t.weights) for t in three if t.weights[0].role == "o"] == [3, 2]
    assert sum(len(t.weights) for t in three) == 5 * 7
    kept = METHOD.targets(anatomy, exclude=["*.0.self_attn.q_proj"])
    assert [len(t.weights) for t in kept if t.weights[0].role == "q"] == [1, 2, 1]


def test_one_block_alone_is_svd_llm():
    models = {}
    for name, knobs in (("svd_llm", {}), ("basis_sharing", {"group": 1})):
        models[name] = tiny.llama()
        asked = {"keep": 0.6, "set": knobs, "task": tiny.tokens(), "evaluate": False}
        rankine.compress(models[name], method=name, dtype="bfloat16", **asked)
    a, b = (m.state_dict() for m in models.values())
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_group_of_no_blocks():
    with pytest.raises(UserError, match="group of at least 1"):
        get("basis_sharing", {"group": 0})


# -- on disk ------
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three blocks: a pair that shares, and one left over."""
    place = tmp_path_factory.mktemp("basis") / "out"
    model = tiny.llama(num_hidden_layers=3)
    asked = {"dtype": "bfloat16", "task": tiny.tokens(padded=True), "evaluate": False}
    return rankine.compress(model, method="basis_sharing", keep=0.6, output=place, **asked)


PAIR = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]


def is_shared(model):
    first, second = (model.get_submodule(path) for path in PAIR)
    return first.down.weight is second.down.weight and first.up.weight is not second.up.weight


def logits(model):
    with torch.no_grad():
        return model(tiny.ids()).logits


def test_a_shared_basis_is_stored_once(saved):
    stored = load_file(saved.output / "model.safetensors")
    assert f"{PAIR[0]}.down.weight" in stored
    assert f"{PAIR[1]}.down.weight" not in stored
    targeted = tuple(f"{w.path}." for t in saved.stages[0].targets for w in t.weights)
    bits = sum(16 * t.numel() for name, t in stored.items() if name.startswith(targeted))
    chosen = saved.stages[0].choices
    assert bits == sum(option.bits for option in chosen.values())
    dense = sum(t.size for t in saved.stages[0].targets)
    assert saved.report["budget"]["keep"] == bits / (16 * dense) <= 0.6


def test_loaded_resaved_and_loaded_it_is_still_shared(saved, tmp_path):
    want = logits(saved.model)
    loaded = rankine.load(saved.output)
    assert is_shared(loaded)
    assert torch.equal(logits(loaded), want)
    loaded.save_pretrained(tmp_path / "theirs")  # by transformers itself
    rankine.save(loaded, tmp_path / "ours")
    for place in ("theirs", "ours"):
        again = rankine.load(tmp_path / place)
        assert is_shared(again)
        assert torch.equal(logits(again), want)
        assert f"{PAIR[1]}.down.weight" not in load_file(tmp_path / place / "model.safetensors")


def test_merged_it_is_the_same_function(saved, tmp_path):
    from rankine.checkpoint.export import export_dense

    export_dense(saved.output, tmp_path / "dense")
    dense = rankine.load(tmp_path / "dense")
    assert type(dense.get_submodule(PAIR[0])) is torch.nn.Linear
    error = (logits(dense) - logits(saved.model)).abs().max()
    assert float(error) < 0.05 * float(logits(dense).abs().max())


# -- behind the compressed layers -----
def inputs_of(model, task, path):
    """(positions, i) that the module at a path reads."""
    rows = []

    def listen(_, args):
        rows.append(args[0].reshape(-1, args[0].shape[-1]))

    handle = model.get_submodule(path).register_forward_pre_hook(listen)
    with torch.no_grad():
        for batch in task.batches("calibration"):
            task.run(model, batch)
    handle.remove()
    return torch.cat(rows).double()


def with_modules(model, source, paths):
    """A copy of `model` that has `source`'s modules at some paths."""
    made = copy.deepcopy(model)
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        setattr(made.get_submodule(parent), leaf, source.get_submodule(path))
    return made


def product(model, path):
    module = model.get_submodule(path)
    return module.up.weight.double() @ module.down.weight.double()


def test_update_fits_to_what_the_layers_read_behind_the_compressed_ones():
    """The pair of `up` is solved in block 1, when only `o` stands compressed before it; what
    follows block 1 reads through the pair."""
    model, dense = (tiny.llama(num_hidden_layers=3) for _ in range(2))
    task = tiny.tokens()
    asked = {"include": ["*.o_proj", "*.up_proj"], "task": task, "evaluate": False}
    result = rankine.compress(
        model, method="basis_sharing", set={"update": True}, bits=20.0, **asked
    )
    o = [f"model.layers.{n}.self_attn.o_proj" for n in range(3)]
    up = [f"model.layers.{n}.mlp.up_proj" for n in range(3)]
    before = with_modules(dense, model, o[:2])
    x = torch.cat([inputs_of(before, task, path) for path in up[:2]])
    stack = torch.cat([dense.get_submodule(path).weight for path in up[:2]]).double()
    choice = result.patch.modules[up[0]]
    parts = choice.encode(stack, Metric(Gram(x.T @ x / len(x))))
    wanted = choice.decode(parts)
    found = torch.cat([product(model, path) for path in up[:2]])
    assert torch.allclose(found, wanted, atol=1e-4)
    elsewhere = Metric(Gram((y := inputs_of(dense, task, up[1])).T @ y))
    assert not torch.allclose(found, choice.decode(choice.encode(stack, elsewhere)), atol=1e-2)

    after = with_modules(dense, model, o[:2] + up[:2])
    x = inputs_of(after, task, o[2])
    w = dense.get_submodule(o[2]).weight.double()
    alone = result.patch.modules[o[2]]
    wanted = alone.decode(alone.encode(w, Metric(Gram(x.T @ x / len(x)))))
    assert torch.allclose(product(model, o[2]), wanted, atol=1e-4)


def test_updated_and_resumed_in_the_middle_of_a_pair(tmp_path):
    """Whatever had been solved: the same bits."""

    def run(**more):
        model = tiny.llama(num_hidden_layers=3)
        asked = {"set": {"update": True}, "keep": 0.6, "dtype": "bfloat16", "evaluate": False}
        task = tiny.tokens()
        return rankine.compress(model, method="basis_sharing", task=task, **asked, **more)

    whole = run().model.state_dict()
    for solved in (1, 3, 8):

        def interrupt(name, done, total, solved=solved):
            if name == "solve" and done >= solved:
                raise KeyboardInterrupt

        work = str(tmp_path / f"work-{solved}")
        with pytest.raises(KeyboardInterrupt):
            run(work=work, progress=interrupt)
        resumed = run(work=work).model.state_dict()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
