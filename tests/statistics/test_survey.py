"""The survey measures block by block what hooks on the whole model measure at once."""

import gc

import pytest
import surveys
import torch
from surveys import GRADIENTS, INPUTS, MODELS, Spool, built, close, surveyed
from torch import nn

import tiny_models as tiny
from rankine.anatomy import describe
from rankine.errors import UserError
from rankine.statistics import Moment, OutputGradient, Walk, survey
from rankine.tasks import FunctionTask


@pytest.mark.parametrize("name", MODELS)
def test_input_moments_are_those_of_hooks_on_the_whole_model(name):
    model, task = built(name)
    found, anatomy = surveyed(model, task)
    plain = surveys.plain_inputs(model, task, [w.path for w in anatomy.linears])
    for weight in anatomy.linears:
        mine, wanted = found.inputs(weight), plain[weight.path]
        assert mine.count == wanted.count
        assert close(mine.h_nn, wanted.h_nn)
        assert close(mine.mean_n, wanted.mean_n)
        assert close(mine.covariance, wanted.covariance, 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_moments_are_those_of_autograd_through_the_whole_model(name):
    """Per position of the summed terms, scaled by positions per term."""
    model, task = built(name)
    found, anatomy = surveyed(model, task, GRADIENTS)
    plain = surveys.plain_gradients(model, task, [w.path for w in anatomy.linears])
    if name == "mlp":
        scale = 1.0
    else:
        batches = task.batches("calibration")
        positions = sum(int(b["attention_mask"].sum()) for b in batches)
        terms = (
            len(tiny.ids()) if name == "bert" else sum(int(task.terms(b).sum()) for b in batches)
        )
        scale = positions / terms
    for weight in anatomy.linears:
        wanted = surveys.moment(plain[weight.path])
        assert close(found.gradient(weight, GRADIENTS).h_nn, scale * wanted.h_nn, 1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_neither_batch_size_nor_order_matters(name):
    model = MODELS[name]().double()
    x, needs = tiny.ids(), (INPUTS, OutputGradient(0.75, 10.0))
    lengths = torch.tensor([10, 6, 9, 5, 10, 7])
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    one, anatomy = surveyed(model, tiny.Tokens(x, 6, lengths), *needs)
    many, _ = surveyed(model, tiny.Tokens(x[order], 1, lengths[order]), *needs)
    for weight in anatomy.linears:
        assert close(many.inputs(weight).h_nn, one.inputs(weight).h_nn)
        assert close(many.inputs(weight).mean_n, one.inputs(weight).mean_n)
        assert close(many.gradient(weight, needs[1]).h_nn, one.gradient(weight, needs[1]).h_nn)


def test_padding_does_not_count():
    """Longer padding, and other ids under it, change nothing."""
    model, x = tiny.llama().double(), tiny.ids(4, 6)
    garbage = tiny.ids(4, 5, seed=9)
    task = tiny.Tokens(x, 2)
    longer = tiny.Tokens(torch.cat([x, garbage], 1), 2, torch.full((4,), 6))
    plain, anatomy = surveyed(model, task, INPUTS, GRADIENTS)
    padded, _ = surveyed(model, longer, INPUTS, GRADIENTS)
    for weight in anatomy.linears:
        assert padded.inputs(weight).count == 24
        assert close(padded.inputs(weight).h_nn, plain.inputs(weight).h_nn, 1e-8)
        mine, wanted = (s.gradient(weight, GRADIENTS).h_nn for s in (padded, plain))
        assert close(mine, wanted, 1e-8)


def test_a_users_own_language_task_with_its_cache_on():
    """`model(**batch)` lets transformers make a cache; blocks run again and again must not fill
    it."""
    model, x = tiny.llama().double(), tiny.ids()
    model.config.use_cache = True
    task = FunctionTask(
        [{"input_ids": part} for part in x.split(2)],
        loss=lambda out, b: tiny.Tokens.loss(
            None, out, {**b, "attention_mask": torch.ones_like(b["input_ids"])}
        ),
    )
    anatomy = describe(model)
    model.requires_grad_(False)
    walk = Walk(model, anatomy, task, list(task.batches("calibration")))
    first = [walk.forward(anatomy.blocks[0], n, h) for n, h in enumerate(walk.hidden)]
    again = [walk.forward(anatomy.blocks[0], n, h) for n, h in enumerate(walk.hidden)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    found, _ = surveyed(model, task, INPUTS, GRADIENTS)
    plain = surveys.plain_inputs(model, task, [w.path for w in anatomy.linears])
    for weight in anatomy.linears:
        assert close(found.inputs(weight).h_nn, plain[weight.path].h_nn)


def test_statistics_follow_the_module_that_reads_first():
    """q, k and v share one moment, gate and up another; excluded readers cost nothing."""
    model, task, spool = tiny.llama(), tiny.tokens(), Spool()
    anatomy = describe(model)
    walk = Walk(model, anatomy, task, list(task.batches("calibration")))
    block = anatomy.blocks[0]
    k = next(w for w in block.weights if w.role == "k")
    q = next(w for w in block.weights if w.role == "q")
    found = survey(walk, {k.path: frozenset({INPUTS})}, spool.get, spool.keep)
    assert found.inputs(k) is not None
    assert torch.equal(found.inputs(q).h_nn, found.inputs(k).h_nn)
    down = next(w for w in block.weights if w.role == "down")
    with pytest.raises(KeyError, match="not declared"):
        found.inputs(down)


# -- what the survey leaves behind -----
def traces(model):
    """Everything a walk could leave on a model."""
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )
    replaced = [path for path, m in model.named_modules() if "forward" in m.__dict__]
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    return hooks, replaced, grads


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mlp"])
def test_the_model_is_left_as_it_was(name):
    model, task = built(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    clean = traces(model)
    surveyed(model, task, INPUTS, GRADIENTS)
    assert traces(model) == clean
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("place", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("runs", range(5))
def test_also_when_something_breaks_on_the_way(place, runs):
    """An exception in any pass: recording, forwards, tail, backwards."""
    model, task = tiny.llama(), tiny.tokens()
    broken = model.get_submodule(f"model.layers.1.{place}")
    plain, calls = broken.forward, [0]

    def breaks(x):
        calls[0] += 1
        if calls[0] > runs:
            raise RuntimeError("out of memory")
        return plain(x)

    broken.forward = breaks
    clean = traces(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        surveyed(model, task, INPUTS, GRADIENTS)
    assert traces(model) == clean


# -- faults -----
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_layer(bad):
    model, task = tiny.llama(), tiny.tokens()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = bad
    with pytest.raises(UserError) as caught:
        surveyed(model, task)
    assert "model.layers.1.mlp.down_proj" in str(caught.value)
    assert "finite" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gradients_that_are_not_finite_name_their_layer():
    model, task = tiny.llama(), tiny.tokens()

    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    plain = model.model.layers[1].forward
    model.model.layers[1].forward = lambda x, *a, **k: plain(Cliff.apply(x), *a, **k)
    with pytest.raises(UserError) as caught:
        surveyed(model, task, GRADIENTS)
    text = str(caught.value)
    assert "found NaN or infinity at model.layers.0." in text
    assert "gradients" in text


def test_a_layer_that_no_token_reaches_is_named():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.used(x) if x.shape[0] else self.unused(x)

    with pytest.raises(UserError, match="reach unused"):
        surveyed(Gated(), tiny.regression())


# -- resume and memory -----
def test_a_resumed_survey_measures_only_what_is_missing():
    model, task = tiny.llama(num_hidden_layers=3), tiny.tokens()
    spool = Spool()
    whole, anatomy = surveyed(model, task, INPUTS, GRADIENTS, spool=spool)
    everything, spool.written = set(spool), []
    surveyed(model, task, INPUTS, GRADIENTS, spool=spool)
    assert spool.written == []
    wanted = whole.inputs(anatomy.blocks[1].weights[0]).h_nn
    lost = [unit for unit in everything if unit.startswith("1")]
    for unit in lost:
        del spool[unit]
    again, _ = surveyed(model, task, INPUTS, GRADIENTS, spool=spool)
    assert sorted(spool.written) == sorted(lost)
    assert torch.equal(again.inputs(anatomy.blocks[1].weights[0]).h_nn, wanted)


def test_a_complete_spool_needs_no_forward_pass():
    model, task, spool = tiny.llama(), tiny.tokens(), Spool()
    surveyed(model, task, INPUTS, spool=spool)
    for block in model.model.layers:
        block.forward = lambda *a, **k: pytest.fail("measured twice")
    anatomy = describe(model)
    walk = Walk(model, anatomy, task, list(task.batches("calibration")))
    wanted = {w.path: frozenset({INPUTS}) for w in anatomy.linears}
    survey(walk, wanted, spool.get, spool.keep)


def test_interrupted_is_the_same_as_uninterrupted():
    model, task = tiny.gpt2(num_hidden_layers=3), tiny.tokens()
    whole, cut = Spool(), Spool()
    surveyed(model, task, INPUTS, GRADIENTS, spool=whole)
    for stop in (2, 4, 5):

        def progress(done, total, stop=stop):
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            surveyed(model, task, INPUTS, GRADIENTS, spool=cut, progress=progress)
    surveyed(model, task, INPUTS, GRADIENTS, spool=cut)
    assert whole.keys() == cut.keys()
    for unit, tensors in whole.items():
        assert all(torch.equal(t, cut[unit][name]) for name, t in tensors.items())


def test_progress_counts_blocks_up_to_the_end():
    model, task, seen = tiny.llama(num_hidden_layers=3), tiny.tokens(), []
    surveyed(
        model, task, INPUTS, GRADIENTS, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize("needs", [(INPUTS,), (INPUTS, GRADIENTS)])
def test_autograd_holds_one_block_at_a_time(needs):
    """What backward passes save does not grow with depth, nor do moments wait in memory."""

    def peak(depth):
        model, task = tiny.llama(num_hidden_layers=depth), tiny.tokens()
        live, most = set(), [0]

        class Saved:
            def __init__(self, tensor):
                self.tensor = tensor
                live.add(id(self))
                most[0] = max(most[0], len(live))

            def __del__(self):
                live.discard(id(self))

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            surveyed(model, task, *needs)
        gc.collect()
        return most[0]

    assert peak(6) == peak(2)


def test_moments_do_not_wait_for_the_reverse_walk():
    """Every block's input moments are spooled as soon as they are measured."""
    model, task, spool = tiny.llama(num_hidden_layers=4), tiny.tokens(), Spool()
    at = []
    surveyed(model, task, INPUTS, GRADIENTS, spool=spool, progress=lambda *_: at.append(len(spool)))
    assert at == [1, 2, 3, 4, 5, 6, 7, 8]


def test_only_the_block_last_asked_for_is_held():
    model, task, spool = tiny.llama(), tiny.tokens(), Spool()
    asked = []
    found, anatomy = surveyed(model, task, INPUTS, spool=spool)
    found._load = lambda unit: (asked.append(unit), spool.get(unit))[1]
    for weight in anatomy.linears:
        found.inputs(weight)
    assert len(asked) == len(set(asked))  # each block loaded once, in order
    assert isinstance(found.inputs(anatomy.linears[0]), Moment)
