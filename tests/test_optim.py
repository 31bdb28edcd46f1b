"""Compare updates with torch's AdamW to the bit, and with the formulas of AdamW in fp64."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from expo_fast.modeling import grad_sums, l2_norms
from expo_fast.modeling.optimizer import Optimizer, StepReport
from expo_fast.modeling.schedule import learning_rate
from expo_fast.op_backends import native_library, native_optimizer
from expo_fast.op_backends.native_optimizer import GradTerms
from judges import max_error
from test_native import isa, threads

__all__ = ["isa", "threads"]  # fixtures

ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def without_native(monkeypatch):
    """Run the operations of a GPU, and of a CPU without a compiler."""
    monkeypatch.setattr(native_optimizer, "runs", lambda tensors: False)


def small_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def optimizer_of(model):
    return Optimizer(model.named_parameters(), **ADAM)


def give(parameter, gradient):
    """Run a backward() whose gradient is `gradient`."""
    (parameter * gradient).sum().backward()


def train(model, optimizer, steps, max_grad_norm=1.0):
    reports = []
    for step in steps:
        x = torch.randn(11, 5, generator=torch.Generator().manual_seed(step))
        model(x.to(next(model.parameters()).dtype)).float().square().sum().backward()
        reports.append(optimizer.step(1e-2 / (step + 1), max_grad_norm))
    return reports


def bits(model, optimizer):
    tensors, values = optimizer.state_dict()
    everything = dict(model.state_dict()) | tensors
    return {key: t.clone() for key, t in everything.items()}, json.dumps(values)


def assert_same_bits(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    for key in a[0]:
        assert torch.equal(a[0][key], b[0][key]), key


def test_fp32_updates_equal_torch_adamw_to_the_bit():
    model = small_model()
    other = copy.deepcopy(model)
    groups = [
        {"params": [p for p in other.parameters() if p.ndim > 1]},
        {"params": [p for p in other.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-2, fused=True, **ADAM)
    ours = optimizer_of(model)
    for step in range(10):
        x = torch.randn(11, 5, generator=torch.Generator().manual_seed(step))
        for net in (model, other):
            net(x).square().sum().backward()
        theirs.step()
        theirs.zero_grad()
        ours.step(1e-2, math.inf)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            assert p.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_equal_the_formulas_of_adamw_in_fp64(dtype):
    """Check clipping, decay of matrices alone, the bf16 copy and the norms over 20 updates."""
    g = torch.Generator().manual_seed(1)
    parameters = {
        "matrix": nn.Parameter(torch.randn(64, 33, generator=g).to(dtype)),
        "vector": nn.Parameter(torch.randn(33, generator=g).to(dtype)),
    }
    optimizer = Optimizer(parameters.items(), **ADAM)
    truth = {name: p.detach().double() for name, p in parameters.items()}
    m = {name: torch.zeros_like(w) for name, w in truth.items()}
    v = {name: torch.zeros_like(w) for name, w in truth.items()}
    for t in range(1, 21):
        lr, gradients = 1e-2 / t, {}
        for name, p in parameters.items():
            gradients[name] = torch.randn(p.shape, generator=g).to(dtype)
            give(p, gradients[name])
        report = optimizer.step(lr, max_grad_norm=5.0)
        norm = math.sqrt(sum(float(x.double().square().sum()) for x in gradients.values()))
        change = 0.0
        for name, w in truth.items():
            x = gradients[name].double() * min(1.0, 5.0 / norm)
            m[name] = 0.9 * m[name] + 0.1 * x
            v[name] = 0.95 * v[name] + 0.05 * x.square()
            adam = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            truth[name] = w - lr * (adam + (0.1 * w if name == "matrix" else 0.0))
            change += float((truth[name] - w).square().sum())
        assert report.grad_norm == pytest.approx(norm, rel=1e-12)
        assert report.update_norm == pytest.approx(math.sqrt(change), rel=1e-5)
    tensors, _ = optimizer.state_dict()
    for name, p in parameters.items():
        master = p if dtype == torch.float32 else tensors[f"{name}.master"]
        assert max_error(master, truth[name]) < 3e-6
        assert torch.equal(p, master.to(dtype))


def test_the_update_norm_is_that_of_the_change_of_the_weights():
    model = small_model()
    optimizer = optimizer_of(model)
    before = [p.detach().double() for p in model.parameters()]
    (report,) = train(model, optimizer, [0])
    after = [p.detach().double() for p in model.parameters()]
    moved = math.sqrt(
        sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    )
    assert report.update_norm == pytest.approx(moved, rel=1e-5)


def test_updates_of_1e_6_are_not_lost_in_bf16():
    parameter = nn.Parameter(torch.full((64,), 0.1, dtype=torch.bfloat16))
    address = parameter.data_ptr()
    optimizer = Optimizer([("w", parameter)], **ADAM)
    start = parameter.detach().double()
    for _ in range(1000):
        give(parameter, torch.ones(64, dtype=torch.bfloat16))
        optimizer.step(1e-6, math.inf)
    moved = (start - optimizer.state_dict()[0]["w.master"].double()).mean().item()
    assert moved == pytest.approx(1e-3, rel=5e-3)  # lr a step, rounded to the 7e-9 of fp32
    assert (start - parameter.double()).mean().item() == pytest.approx(1e-3, abs=2.5e-4)  # half ulp
    assert parameter.data_ptr() == address


def test_256_micro_batches_sum_as_in_fp64():
    g = torch.Generator().manual_seed(2)
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", parameter)], **ADAM)
    truth = torch.zeros(1000, dtype=torch.float64)
    in_bf16 = torch.zeros(1000, dtype=torch.bfloat16)
    for _ in range(256):
        gradient = (torch.rand(1000, generator=g) + 0.5).bfloat16()
        give(parameter, gradient)
        truth += gradient.double()
        in_bf16 += gradient
    optimizer.step(0.0, math.inf)
    summed = optimizer.state_dict()[0]["w.exp_avg"].double() / (1 - 0.9)  # the first m is 0.1 g
    assert float((summed / truth - 1).abs().max()) < 1e-6
    assert float((in_bf16.double() / truth - 1).abs().max()) > 1e-2  # a bf16 sum is not enough


def ragged_run(micro_batches=3):
    """Train parameters of many shapes; return the reports and the state."""
    g = torch.Generator().manual_seed(4)
    shapes = [(70, 103), (5,), (1,), (0, 3), (64, 33), (), (3000,), (3, 500), (12, 7, 5), (17,)]
    shapes.append((263, 257))  # more than kChunk of csrc/optimizer.cpp
    parameters = {}
    for i, shape in enumerate(shapes):
        dtype = torch.bfloat16 if i % 3 else torch.float32
        parameters[f"p{i}"] = nn.Parameter(torch.randn(shape, generator=g).to(dtype))
    parameters["transposed"] = nn.Parameter(torch.randn(30, 40, generator=g).t())
    optimizer = Optimizer(parameters.items(), **ADAM)
    reports = []
    for step in range(4):
        for micro_batch in range(micro_batches):
            for i, parameter in enumerate(parameters.values()):
                if (i + micro_batch + step) % 4:  # not all get a gradient
                    give(parameter, torch.randn(parameter.shape, generator=g).to(parameter.dtype))
            if micro_batch == 1:
                optimizer.grad_sums.start_new_term()
        reports.append(optimizer.grad_sums.term_norms())
        reports.append(optimizer.grad_sums.norm())
        reports.append(optimizer.step(1e-2 / (step + 1), 1.0))
    tensors = {name: p.detach() for name, p in parameters.items()} | optimizer.state_dict()[0]
    return reports, tensors


@pytest.mark.parametrize("batch", [1, 100, 5000, 1 << 26])
@pytest.mark.parametrize("pending", [0, 1000, 1 << 25])
def test_batches_of_parameters_change_no_bit(without_native, monkeypatch, batch, pending):
    """A GPU processes many parameters at once, a CPU few."""
    expected = ragged_run()
    monkeypatch.setattr(l2_norms, "CPU_BATCH", batch)
    monkeypatch.setattr(grad_sums, "CPU_PENDING", pending)
    reports, tensors = ragged_run()
    assert reports == expected[0]
    assert tensors.keys() == expected[1].keys()
    for key, x in tensors.items():
        assert torch.equal(x, expected[1][key]), key


def test_a_large_tensor_is_processed_in_pieces(without_native, monkeypatch):
    expected, _ = ragged_run()
    monkeypatch.setattr(l2_norms, "CPU_PIECE", 1000)
    reports, _ = ragged_run()
    for got, other in zip(reports[2::3], expected[2::3], strict=True):
        assert got.grad_norm == pytest.approx(other.grad_norm, rel=1e-12)
        assert got.update_norm == pytest.approx(other.update_norm, rel=1e-6)
    assert [len(p) for p in l2_norms.pieces(torch.zeros(7, 300))] == [1000, 1000, 100]


def test_native_updates_have_the_bits_of_torch(isa, monkeypatch):
    """PyTorch's kernel rounds as an instruction set with fused multiply-adds does."""
    found = ragged_run()
    monkeypatch.setattr(native_optimizer, "runs", lambda tensors: False)
    expected = ragged_run()
    exact = isa in ("amx", "avx512_bf16", "avx512", "avx2") and torch.cpu._is_avx2_supported()
    assert found[1].keys() == expected[1].keys()
    for key, x in expected[1].items():
        if exact:
            assert torch.equal(found[1][key], x), key
        else:
            torch.testing.assert_close(found[1][key], x)
    for got, other in zip(found[0], expected[0], strict=True):
        if isinstance(got, StepReport):
            assert got.update_norm == pytest.approx(other.update_norm, rel=1e-6)
            got = got.grad_norm
            other = other.grad_norm
        assert got == pytest.approx(other, rel=1e-14 if exact else 1e-6)


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5])
def test_native_updates_have_the_bits_of_torch_for_a_small_beta1(beta1, monkeypatch):
    """torch.lerp starts from the gradient if its weight is at least 0.5."""
    if native_library.isa() not in ("amx", "avx512_bf16", "avx512", "avx2"):
        pytest.skip("PyTorch's kernel is compiled for AVX2")
    monkeypatch.setitem(ADAM, "betas", (beta1, 0.95))
    _, found = ragged_run()
    monkeypatch.setattr(native_optimizer, "runs", lambda tensors: False)
    _, expected = ragged_run()
    for key, x in expected.items():
        assert torch.equal(found[key], x), key


def test_native_sums_do_not_depend_on_threads(isa, threads):
    g = torch.Generator().manual_seed(5)
    sizes = [1, 7, 70_000, 0, 200_003]
    terms = []
    for i, size in enumerate(sizes):
        first = torch.randn(size, generator=g) * 1e20  # its square overflows fp32
        second = torch.randn(size, generator=g) * 1e20
        terms.append(GradTerms(None if i == 1 else first, None if i == 2 else second))
    torch.set_num_threads(1)
    expected = native_optimizer.squares(terms)
    torch.set_num_threads(3)
    assert native_optimizer.squares(terms) == expected

    def truth(tensors):
        return sum(float(x.double().square().sum()) for x in tensors if x is not None)

    firsts = [first for first, _ in terms]
    seconds = [second for _, second in terms]
    both = [sum(x for x in pair if x is not None) for pair in terms]
    assert expected.first == pytest.approx(truth(firsts), rel=1e-13)
    assert expected.second == pytest.approx(truth(seconds), rel=1e-13)
    assert expected.both == pytest.approx(truth(both), rel=1e-13)


def test_the_update_is_the_same_for_all_numbers_of_threads():
    threads = torch.get_num_threads()
    runs = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        runs.append(ragged_run())
    torch.set_num_threads(threads)
    for reports, tensors in runs[1:]:
        assert reports == runs[0][0]
        for key, x in tensors.items():
            assert torch.equal(x, runs[0][1][key]), key


def test_norms_are_known_again_after_a_new_gradient():
    """A step takes the norm that `term_norms` has computed, if no gradient came after it."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = Optimizer([("w", parameter)], **ADAM)
    give(parameter, torch.full((4,), 3.0))
    assert optimizer.grad_sums.term_norms() == (0.0, 6.0)
    give(parameter, torch.full((4,), 1.0))
    assert optimizer.grad_sums.norm() == 8.0
    optimizer.grad_sums.start_new_term()
    assert optimizer.grad_sums.term_norms() == (8.0, 0.0)
    optimizer.grad_sums.clear()
    assert optimizer.grad_sums.norm() == 0.0


def test_tensors_with_gaps_are_left_to_torch():
    assert native_optimizer.runs([torch.zeros(3, 4).t(), torch.zeros(0, 3), torch.zeros(())])
    assert not native_optimizer.runs([torch.zeros(3, 4)[:, :2]])
    assert not native_optimizer.runs([torch.zeros(1, 4).expand(3, 4)])
    assert not native_optimizer.runs([torch.zeros(3, device="meta")])


class Operations(TorchDispatchMode):
    """Collects the names of the ATen operators; a multi-tensor one counts once."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_operators_of_a_step_do_not_grow_with_the_parameters(without_native, monkeypatch):
    """A Python loop over the parameters of a 0.5B model takes longer than the update on a GPU."""
    monkeypatch.setattr(l2_norms, "CPU_BATCH", l2_norms.GPU_BATCH)
    monkeypatch.setattr(grad_sums, "CPU_PENDING", grad_sums.GPU_PENDING)
    counts = []
    for n in (29, 290):
        parameters = {f"p{i}": nn.Parameter(torch.randn(4 + i % 3).bfloat16()) for i in range(n)}
        optimizer = Optimizer(parameters.items(), **ADAM)
        for _ in range(2):
            for parameter in parameters.values():
                give(parameter, torch.ones_like(parameter))
            with Operations() as operations:
                optimizer.step(1e-3, 1.0)
        work = [name for name in operations.names if name != "view"]
        counts.append(len(work))
        assert work.count("_local_scalar_dense") == 2
    assert counts[0] == counts[1] <= 25


def test_the_gradient_norm_is_exact_beyond_the_range_of_fp32():
    parameter = nn.Parameter(torch.zeros(5_000_000))
    optimizer = Optimizer([("w", parameter)], **ADAM)
    give(parameter, torch.full_like(parameter, 1e-25))  # its square underflows fp32
    assert optimizer.grad_sums.norm() == pytest.approx(1e-25 * math.sqrt(5e6), rel=1e-6)
    optimizer.grad_sums.clear()
    give(parameter, torch.full_like(parameter, 1e25))  # and here it overflows
    report = optimizer.step(0.0, 1.0)
    assert report.grad_norm == pytest.approx(1e25 * math.sqrt(5e6), rel=1e-6)
    assert optimizer.skipped == 0


def test_start_new_term_separates_two_terms_and_changes_no_sum():
    g = torch.Generator().manual_seed(3)
    parameters = {name: nn.Parameter(torch.zeros(50)) for name in ("both", "first", "second")}
    optimizer = Optimizer(parameters.items(), **ADAM)
    draws = {name: torch.randn(4, 50, generator=g) for name in parameters}
    for i in (0, 1):
        for name in ("both", "first"):
            give(parameters[name], draws[name][i])
    optimizer.grad_sums.start_new_term()
    for i in (2, 3):
        for name in ("both", "second"):
            give(parameters[name], draws[name][i])

    def norm(*terms):
        return math.sqrt(sum(float(t.double().sum(0).square().sum()) for t in terms))

    before, after = optimizer.grad_sums.term_norms()
    assert before == pytest.approx(norm(draws["both"][:2], draws["first"][:2]), rel=1e-6)
    assert after == pytest.approx(norm(draws["both"][2:], draws["second"][2:]), rel=1e-6)
    total = norm(draws["both"], draws["first"][:2], draws["second"][2:])
    assert optimizer.grad_sums.norm() == pytest.approx(total, rel=1e-6)
    assert optimizer.step(1e-3, math.inf).grad_norm == pytest.approx(total, rel=1e-6)
    assert optimizer.grad_sums.term_norms() == (0.0, 0.0)


def test_a_new_term_before_any_gradient_takes_no_second_buffer():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = Optimizer([("w", parameter)], **ADAM)
    optimizer.grad_sums.start_new_term()
    give(parameter, torch.full((4,), 3.0))
    assert optimizer.grad_sums.term_norms() == (0.0, 6.0)
    optimizer.step(1e-3, 1.0)
    assert len(optimizer.grad_sums._free["w"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_changes_no_bit(dtype, value):
    model = small_model(dtype)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    weights, values = bits(model, optimizer)
    gradient = torch.zeros(3, dtype=dtype)
    gradient[1] = value
    for k in (1, 2):
        give(model[2].bias, gradient)
        report = optimizer.step(1e-2, 1.0)
        assert not math.isfinite(report.grad_norm)
        assert report.update_norm == 0.0
        assert optimizer.skipped == k
    values = json.dumps(json.loads(values) | {"skipped": 2})
    assert_same_bits(bits(model, optimizer), (weights, values))
    (report,) = train(model, optimizer, [3])  # later steps are not affected
    assert report.update_norm > 0
    assert optimizer.skipped == 2


def test_missing_and_zero_gradients_do_not_change_the_state():
    model = small_model()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))  # moments are not zero: a step would move weights
    before = bits(model, optimizer)
    report = optimizer.step(1e-2, 1.0)
    assert (report.grad_norm, report.update_norm) == (0.0, 0.0)
    for parameter in model.parameters():
        give(parameter, torch.zeros_like(parameter))
    assert optimizer.step(1e-2, 1.0).update_norm == 0.0
    assert_same_bits(bits(model, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_run_equals_the_uninterrupted_one_to_the_bit(dtype):
    model = small_model(dtype)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4))
    optimizer.skipped = 3  # as after three gradients that were not finite
    (tensors, values), weights = optimizer.state_dict(), model.state_dict()
    tensors = {key: t.clone() for key, t in tensors.items()}
    weights = {key: w.clone() for key, w in weights.items()}
    values = json.loads(json.dumps(values))
    straight = train(model, optimizer, range(4, 9))

    resumed = small_model(dtype, seed=99)
    fresh = optimizer_of(resumed)
    train(resumed, fresh, range(2))  # loading replaces this state
    if dtype == torch.float32:
        resumed.load_state_dict(weights)
    else:
        assert weights.keys() == {key.removesuffix(".master") for key in tensors if "master" in key}
    fresh.load_state_dict(tensors, values)
    assert fresh.skipped == 3
    for key, weight in resumed.state_dict().items():
        assert torch.equal(weight, weights[key])
    assert train(resumed, fresh, range(4, 9)) == straight
    assert_same_bits(bits(resumed, fresh), bits(model, optimizer))


def test_state_of_another_model_is_refused_before_anything_changes():
    model = small_model(torch.bfloat16)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    before = bits(model, optimizer)
    tensors, values = optimizer.state_dict()
    missing = {key: t for key, t in tensors.items() if key != "0.weight.master"}
    with pytest.raises(ValueError, match=r"0\.weight\.master is not in the state"):
        optimizer.load_state_dict(missing, values)
    with pytest.raises(ValueError, match=r"extra\.exp_avg is not in the model"):
        optimizer.load_state_dict(tensors | {"extra.exp_avg": torch.zeros(1)}, values)
    with pytest.raises(ValueError, match=r"2\.bias\.exp_avg is torch\.float32 \(1,\)"):
        optimizer.load_state_dict(tensors | {"2.bias.exp_avg": torch.zeros(1)}, values)
    assert_same_bits(bits(model, optimizer), before)


def test_frozen_parameters_are_not_changed_and_invalid_ones_are_named():
    model = small_model()
    model.get_submodule("0").requires_grad_(False)
    frozen = model.state_dict()["0.weight"].clone()
    train(model, optimizer_of(model), range(2))
    assert torch.equal(model.state_dict()["0.weight"], frozen)
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float16"):
        optimizer_of(small_model(torch.float16))
    with pytest.raises(ValueError, match="nothing to train"):
        optimizer_of(model.requires_grad_(False))


def test_learning_rates_follow_warmup_and_schedule():
    def rates(schedule, warmup_steps=4):
        return [
            learning_rate(
                step,
                peak=2.0,
                warmup_steps=warmup_steps,
                total_steps=12,
                schedule=schedule,
            )
            for step in range(14)
        ]

    warmup = [0.5, 1.0, 1.5, 2.0]
    assert rates("constant") == warmup + [2.0] * 10
    assert rates("linear") == warmup + [2.0 * (8 - k) / 8 for k in range(8)] + [0.0, 0.0]
    cosine = [1 + math.cos(math.pi * k / 8) for k in range(8)]
    assert rates("cosine") == pytest.approx(warmup + cosine + [0.0, 0.0], rel=1e-12, abs=1e-12)
    assert rates("linear", warmup_steps=0)[:2] == [2.0, 2.0 * 11 / 12]
    with pytest.raises(ValueError, match=r"schedule='sine': use one of constant, linear, cosine"):
        rates("sine")


def test_moments_are_allocated_before_the_first_step():
    """In the first step they would take the memory of freed activations."""
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = Optimizer([("weight", weight)], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    before = {key: x.data_ptr() for key, x in optimizer._adamw.state[weight].items()}
    (weight**2).sum().backward()
    optimizer.step(0.1, 1.0)
    assert before.keys() >= {"exp_avg", "exp_avg_sq"}
    assert before == {key: x.data_ptr() for key, x in optimizer._adamw.state[weight].items()}
