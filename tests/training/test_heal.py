"""Healing: what is trained, what stays, and that it helps."""

import copy

import pytest
import torch
from training_models import compressed, counting, linear_paths

from rankine.checkpoint import load, save
from rankine.checkpoint.export import export_peft
from rankine.errors import UserError
from rankine.method import Schedule, get
from rankine.metric import Metric
from rankine.patch import Patch
from rankine.structures import LowRank, Quantized, Sum, matrix
from rankine.tasks.distillation import Distillation
from rankine.training.heal import Healing, LoraHealing, adapter_places, standing
from rankine.training.loop import train

LOW = [LowRank(4)]
MIXED = [
    LowRank(4),
    LowRank(4, pivoted=True),
    Quantized(2, group=16),
    Sum(base=Quantized(2, group=16), low_rank=LowRank(2)),
]
SHORT = Schedule(12, 3e-3)


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, old in before.items() if not torch.equal(old, model.state_dict()[name])}


def logits(model):
    with torch.no_grad():
        return model(counting(4, 9)).logits


@pytest.mark.parametrize("knobs", [{}, {"mode": "lora", "lora_rank": 4}, {"kl_weight": 0}])
def test_healing_wins_back_most_of_what_compression_lost(dense, task, knobs):
    student, patch = compressed(dense, LOW)
    method = get("heal", {"steps": 40, "lr": 5e-3, **knobs})
    before, goal = task.score(student)["loss"], task.score(dense)["loss"]
    train(student, method.objective(task, dense), method.learner(patch), method.schedule)
    after = task.score(student)["loss"]
    assert after - goal < 0.5 * (before - goal)


def test_only_what_the_structures_declare_changes(dense, task):
    student, patch = compressed(dense, MIXED)
    declared = {f"{path}.{n}" for path, s in patch.modules.items() for n in s.trainable}
    before = tensors(student)
    found, _ = train(student, task, Healing(patch), SHORT)
    assert changed(before, student) == declared == set(found.tensors)
    assert any(name.endswith("pivots") for name in before)
    assert any(name.endswith("codes") for name in before)


def test_what_a_later_stage_put_inside_a_factor_declares_for_itself(dense, task):
    student, patch = compressed(dense, LOW)
    inside = Patch()
    for path in list(patch.modules)[:3]:
        codes = Quantized(4, group=16)
        w = student.get_submodule(path).down.weight.detach()
        inside |= Patch.of(f"{path}.down", codes, codes.encode(w, Metric()))
    inside.apply(student)
    before = tensors(student)
    train(student, task, Healing(patch | inside), SHORT)
    quantized = {f"{path}.{part}" for path in inside.modules for part in ("scale", "minimum")}
    factors = {n for n in before if n.endswith(("down.weight", "up.weight"))}
    assert changed(before, student) == quantized | factors


def test_norms_are_trained_on_demand_and_everything_in_mode_all(dense, task):
    student, patch = compressed(dense, LOW)
    before = tensors(student)
    train(student, task, Healing(patch, norms=True), SHORT)
    norms = {name for name in changed(before, student) if "norm" in name}
    assert len(norms) == 2 * 2 + 1
    student, patch = compressed(dense, MIXED)
    before = tensors(student)
    train(student, task, Healing(patch, everything=True), SHORT)
    fixed = {name for name in before if name.endswith(("codes", "pivots"))}
    assert changed(before, student) == set(before) - fixed
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize("learner", [Healing, LoraHealing])
def test_no_bit_is_added(dense, task, learner, tmp_path):
    student, patch = compressed(dense, MIXED)
    shapes = {name: (t.shape, t.dtype) for name, t in student.state_dict().items()}
    train(student, task, learner(patch), SHORT)
    assert {name: (t.shape, t.dtype) for name, t in student.state_dict().items()} == shapes
    save(student, tmp_path / "healed", patch)
    torch.testing.assert_close(logits(load(tmp_path / "healed")), logits(student))


def test_tied_factors_stay_tied_and_the_patch_restores_them(dense, task):
    first, second = (f"model.layers.{n}.mlp.down_proj" for n in (0, 1))
    both = torch.cat([matrix(dense.get_submodule(p)).detach() for p in (first, second)])
    parts = LowRank(6).encode(both, Metric())
    down, up = parts["down.weight"], parts["up.weight"]
    # Tied to the later name: the order of names may not decide which one is stored.
    patch = (
        Patch.of(second, LowRank(6), {"down.weight": down, "up.weight": up[32:].clone()})
        | Patch.of(first, LowRank(6), {"up.weight": up[:32].clone()})
        | Patch(tied={f"{first}.down.weight": f"{second}.down.weight"})
    )
    student = patch.apply(copy.deepcopy(dense))
    found, _ = train(student, task, Healing(patch), SHORT)
    assert student.get_submodule(first).down.weight is student.get_submodule(second).down.weight
    assert f"{second}.down.weight" in found.tensors
    again = (patch | found).apply(copy.deepcopy(dense))
    torch.testing.assert_close(logits(again), logits(student))
    # One product added to a shared factor would change both layers: LoRA leaves it out.
    places = adapter_places(student, patch)
    assert f"{first}.up" in places
    assert f"{first}.down" not in places


def test_the_patch_on_a_dense_model_keeps_tied_embeddings_tied(dense, task):
    healed = copy.deepcopy(dense)
    found, _ = train(healed, task, Healing(Patch(), everything=True), SHORT)
    found.apply(dense)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(logits(dense), logits(healed))


def test_the_adapter_applied_by_peft_is_the_adapter_merged(dense, task, tmp_path):
    from peft import PeftModel

    student, patch = compressed(dense, MIXED)
    save(student, tmp_path / "base", patch)
    learner = LoraHealing(patch, rank=2)
    before = logits(student)
    train(student, task, learner, SHORT)
    assert not torch.allclose(logits(student), before, atol=1e-3)
    export_peft(learner.factors, tmp_path / "adapter", base=str(tmp_path / "base"))
    applied = PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(applied), logits(student), atol=1e-5, rtol=1e-4)


def test_lora_heals_a_dense_model_in_its_blocks(dense):
    assert adapter_places(dense, Patch()) == linear_paths(dense)


def test_what_cannot_be_trained_is_one_sentence(dense, task):
    with pytest.raises(UserError, match="compressed model with factors"):
        train(dense, task, Healing(Patch()), SHORT)
    quantized, patch = compressed(dense, [Quantized(4, group=16)])
    with pytest.raises(UserError, match="linear layers for LoRA"):
        train(quantized, task, LoraHealing(patch), SHORT)
    with pytest.raises(UserError, match="did you mean"):
        get("heal", {"mode": "factor"})


def test_a_model_in_memory_says_what_stands_in_it(dense):
    student, patch = compressed(dense, MIXED)
    assert standing(student, Patch()).modules == dict(patch.modules)


def test_the_divergence_is_zero_for_the_teacher_itself_and_scales_with_its_weight(dense, task):
    student, _ = compressed(dense, LOW)
    batch = next(iter(task.batches("evaluation")))
    with torch.no_grad():
        own = Distillation(task, dense).divergence(dense(**batch), batch)
        one = Distillation(task, dense, ce_weight=0).loss(student(**batch), batch)
        two = Distillation(task, dense, kl_weight=2, ce_weight=1).loss(student(**batch), batch)
        nats = task.loss(student(**batch), batch)
    assert float(own.abs().max()) < 1e-6
    assert bool((one > 0).all())
    torch.testing.assert_close(two, 2 * one + nats)


@pytest.mark.parametrize("mode", ["factors", "lora", "all"])
def test_masters_are_float32_among_16_bit_weights(dense, task, mode):
    student, patch = compressed(dense, MIXED)
    student = student.to(torch.bfloat16)
    learner = get("heal", {"mode": mode}).learner(patch)
    before = task.score(student)["loss"]
    found, _ = train(student, task, learner, Schedule(20, 3e-3))
    assert {t.dtype for t in found.tensors.values()} == {torch.float32} or mode == "lora"
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert task.score(student)["loss"] < before
