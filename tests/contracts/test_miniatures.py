"""The contracts in miniature, on the six systems that stretch them most: plain and whitened SVD,
a basis shared between layers, a Nyström MLP, a KV-cache block, and a plan for gradients. Each is
built from Structure, Metric, Patch, Option and Bid alone, as its method file will be."""

import torch
import torch.nn.functional as F
from torch import nn

from rankine.budget import Bid, Knapsack, Option
from rankine.linalg.lowrank import weighted
from rankine.metric import Gram, Metric
from rankine.patch import Patch, dense_patch, narrow
from rankine.structures import Dense, LowRank, Quantized, Sum, from_json


def linear(o, i, seed=0, bias=False):
    torch.manual_seed(seed)
    return nn.Linear(i, o, bias=bias)


def inputs(n, i, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, i) @ torch.randn(i, i)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear(12, 16, 1), linear(12, 16, 2)

    def forward(self, x):
        return self.a(x) + 2 * self.b(x)


def test_svd_is_the_value_the_solver_and_the_patch():
    model = nn.Sequential(linear(24, 16, bias=True))
    structure, w = LowRank(5), model[0].weight.detach()
    parts = structure.encode(w, Metric())
    patch = Patch.of("0", structure, parts)
    dense = structure.decode(parts)
    u, s, v = torch.linalg.svd(w)
    assert torch.allclose(dense, (u[:, :5] * s[:5]) @ v[:5], atol=1e-5)
    assert structure.bits(w.shape, w.dtype) == patch.bits() == 5 * (24 + 16) * 32
    x = torch.randn(7, 16)
    wanted = F.linear(x, dense, model[0].bias)
    patch.apply(model)
    assert torch.allclose(model(x), wanted, atol=1e-5)  # the bias moved to `up`
    assert set(model[0].state_dict()) == {"down.weight", "up.weight", "up.bias"}


def test_svd_llm_minimises_the_error_on_the_data():
    w, x = linear(24, 16).weight.detach(), inputs(200, 16)
    metric = Metric(Gram((x.T @ x).double()))
    approx = LowRank(6).decode(LowRank(6).encode(w, metric))
    # Eckart-Young in the data's norm: the squared error is the tail of the outputs' spectrum.
    tail = torch.linalg.svdvals((x @ w.T).double())[6:].square().sum()
    error = (x.double() @ (w - approx).T.double()).square().sum()
    assert torch.allclose(error, tail, rtol=1e-5)
    option = LowRank(1).curve(w, metric)[5]
    assert option.structure == LowRank(6)
    assert abs(option.loss - float(tail)) < 1e-5 * float(tail)


def test_basis_sharing_is_two_modules_with_a_tied_tensor():
    model = Pair()
    stacked = torch.cat([model.a.weight, model.b.weight]).detach()
    joint = LowRank(6).encode(stacked, Metric())
    down, up = joint["down.weight"], joint["up.weight"]
    patch = Patch.of("a", LowRank(6), {"down.weight": down, "up.weight": up[:12].clone()})
    patch |= Patch(
        {"b": LowRank(6)},
        {"b.up.weight": up[12:].clone()},
        tied={"b.down.weight": "a.down.weight"},
    )
    patch.apply(model)
    assert model.b.down.weight is model.a.down.weight
    assert patch.bits() == (6 * 16 + 2 * 12 * 6) * 32  # the shared basis counts once
    again = Patch.from_json(patch.to_json(), patch.tensors)
    assert again.modules == patch.modules
    assert again.tied == patch.tied


def test_nystrom_mlp_is_an_ordinary_patch_of_narrower_weights():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = linear(32, 8, 3, bias=True), linear(8, 32, 4)

        def forward(self, x):
            return self.down(F.relu(self.up(x)))

    mlp, x = Mlp(), torch.randn(500, 8)
    hidden = F.relu(mlp.up(x)).detach().double()
    c = hidden.T @ hidden
    ridge = 1e-2 * c.diagonal().mean() * torch.eye(32)
    scores = 1 - (ridge[0, 0] * torch.linalg.inv(c + ridge).diagonal())
    kept = scores.topk(20).indices.sort().values
    refit = torch.linalg.solve(c[kept][:, kept] + 1e-8 * ridge[kept][:, kept], c[kept]).T
    with torch.no_grad():
        target = mlp(x)
    patch = narrow(mlp, rows={"up": kept}, columns={})
    w_down = (mlp.down.weight.detach().double() @ refit).float()
    patch |= Patch.of("down", Dense((8, 20)), {"weight": w_down})
    plain = narrow(mlp, rows={"up": kept}, columns={"down": kept})
    errors = []
    for candidate in (patch, plain):
        copy = Mlp()
        copy.load_state_dict(mlp.state_dict())
        candidate.apply(copy)
        assert copy.up.out_features == copy.down.in_features == 20
        errors.append(float((copy(x).detach() - target).square().mean()))
    assert errors[0] < 0.8 * errors[1]  # the read-out from the kept units is refitted
    assert from_json(Dense((8, 20)).to_json()) == Dense((8, 20))


def test_a_gear_block_is_a_sum_over_heads_without_a_model():
    torch.manual_seed(0)
    heads = torch.randn(2, 4, 64, 32).half().float()  # (batch, KV heads, tokens, head_dim)
    heads[..., 3] *= 8  # a channel of outliers, as keys have
    backbone = Quantized(2, group=64, axis=-2)
    both = Sum(base=backbone, low_rank=LowRank(4))
    errors = {}
    for name, structure in (("backbone", backbone), ("gear", both)):
        parts = structure.encode(heads, Metric())
        errors[name] = float((structure.decode(parts) - heads).norm())
        stored = sum(t.numel() * t.element_size() * 8 for t in parts.values())
        assert stored == structure.bits(heads.shape, heads.dtype)
    assert errors["gear"] < errors["backbone"]
    # Compressing a batch of different sequences is compressing each alone.
    alone = both.decode(both.encode(heads[1:], Metric()))
    assert torch.allclose(both.decode(both.encode(heads, Metric()))[1:], alone, atol=1e-4)


def test_an_l_greco_plan_is_bids_and_the_allocators_other_direction():
    torch.manual_seed(0)
    gradients = {
        f"layer{n}": 4.0**n * torch.randn(32, 24) @ torch.diag(torch.linspace(1, 0.02, 24))
        for n in range(4)
    }
    uniform = 4
    bids, reference = [], 0.0
    for name, g in gradients.items():
        options = []
        tails = weighted(g).tails.sqrt()
        for rank in range(uniform // 2, 2 * uniform + 1):
            structure = LowRank(rank)
            bits = structure.bits(g.shape, g.dtype)
            options.append(Option(structure, bits, float(tails[rank])))
        reference += float(tails[uniform])
        bids.append(Bid(name, (name,), tuple(options), g.numel() * 16))
    plan = Knapsack().smallest(bids, reference)
    sent = sum(o.bits for o in plan.values())
    assert sum(o.loss for o in plan.values()) <= reference * (1 + 1e-9)
    assert sent < 4 * LowRank(uniform).bits((32, 24), torch.float32)


def test_patches_compose_merge_back_and_address_inner_modules():
    model = nn.Sequential(linear(12, 16, 5), nn.ReLU(), linear(10, 12, 6, bias=True))
    x = torch.randn(4, 16)
    factored = Patch.of("0", LowRank(8), LowRank(8).encode(model[0].weight.detach(), Metric()))
    factored.apply(model)
    after = model(x)
    w = model[0].up.weight.detach()
    inner = Patch.of("0.up", Quantized(8, 8), Quantized(8, 8).encode(w, Metric()))
    inner.apply(model)
    assert (model(x) - after).abs().max() < 0.05
    chain = factored | inner
    fresh = nn.Sequential(linear(12, 16, 5), nn.ReLU(), linear(10, 12, 6, bias=True))
    chain.apply(fresh)
    assert torch.equal(fresh(x), model(x))
    replaced = chain | Patch.of("0", Dense(), {"weight": torch.zeros(12, 16)})
    assert set(replaced.modules) == {"0"}  # what stood below is gone
    dense_patch(model).apply(model)
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model(x), fresh(x), atol=1e-5)
