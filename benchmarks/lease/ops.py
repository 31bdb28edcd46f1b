"""Time the ops against their peers, and check that repeated calls agree to the bit."""

from functools import partial

from torch import Tensor

from benchmarks.cases import OPS, OURS, SHAPES, Case, Group, groups
from benchmarks.lease.report import Mismatch, Report
from benchmarks.measure import measure
from benchmarks.summary import ms, show

REPEATED = "qwen2.5-0.5b"
ROWS = [16384, 1024, 4096]  # the most important first, because the time may run out
NAMES = ["logprob forward+backward", "policy loss", "logprob forward", "preference loss"]
LIGER = "Liger scaled cross entropy"
# Contestants that are left out: the first compiles for longer than all others run, the second took
# 1.8 s where ours takes 25 ms, and the third, which compiles for long too, is timed by
# `beside_liger`.
WITHOUT = ("eager, torch.compile", "LigerFusedLinearGRPOLoss", LIGER)
REPEATS = 5
SECONDS = 6  # no group starts with less time left
REPEATED_CALLS = 50  # calls whose results must be equal to the bit
SMALL = "small"


def timed(report: Report, model: str) -> None:
    """Time each op against eager PyTorch and the installed peers, all checked against fp64."""
    if report.dry:
        return every_contestant(report)
    todo = groups([model], ROWS, NAMES)
    todo.sort(key=lambda group: group.zeros)
    for group in todo:
        if report.left() < SECONDS:
            report.extend("not_reached", str(group))
            continue
        # An attempt fails only if ours fails: `measure` reports the failure of a peer as a result.
        work = partial(measure, group, report.device, REPEATS, WITHOUT)
        found = report.attempt(str(group), work)
        if found:
            show(found)
            report.extend("results", found)
    results = report.found.get("results", [])
    for result in results:
        group = Group(*(result[name] for name in Group.__dataclass_fields__))
        ours = result["contestants"][OURS]
        if group.rows == ROWS[0] and not group.zeros:
            shown = f"{ms(ours['median_s'])} ms, {ours['of_limit']:.0%} of limit"
            report.show(**{group.op: shown})
    report.show(groups=len(results), failed=len(report.found.get("failed", {})))
    report.require_all()
    if not results:
        raise Mismatch("nothing was timed", {})


def beside_liger(report: Report, models: list[str]) -> None:
    """Time log-probs and their gradients against Liger's kernels for Hopper (CUTLASS)."""
    if report.dry:
        return
    others = {name for name, _ in OPS[NAMES[0]].contestants(report.device)} - {OURS, LIGER}
    for model in models:
        group = Group(NAMES[0], model, ROWS[0], zeros=0)
        run = partial(measure, group, report.device, REPEATS, tuple(others))
        found = report.attempt(str(group), run)
        if found:
            show(found)
            report.extend("results", found)
            if LIGER in found["contestants"]:
                times = found["contestants"][LIGER]["times_ours"]
                report.show(**{model: f"{times:.2f} times ours"})
    report.require_all()


def every_contestant(report: Report) -> None:
    """Run ours once for each op, on a few rows."""
    for op in OPS:
        case = small_case(op)
        for name, contestant in OPS[op].contestants("cpu"):
            if name == OURS:
                OPS[op].run(contestant, case)
    report.show(ops=len(OPS))


def small_case(op: str) -> Case:
    """Return inputs for a dry run."""
    SHAPES[SMALL] = (264, 64)
    return Group(op, SMALL, 64, zeros=0).case("cpu")


def repeated(report: Report) -> None:
    """Run each op many times on the same inputs: values and gradients must be equal to the bit."""
    calls = 2 if report.dry else REPEATED_CALLS
    for op in OPS:
        group = Group(op, REPEATED, ROWS[1], zeros=0)
        case = small_case(op) if report.dry else group.case(report.device)
        contestant = dict(OPS[op].contestants(report.device))[OURS]

        def call(op: str = op, case: Case = case, contestant: object = contestant) -> list[Tensor]:
            case.hidden.grad = case.weight.grad = None
            value = OPS[op].run(contestant, case)  # pyright: ignore[reportArgumentType]
            grads = (case.hidden.grad, case.weight.grad)
            return [value, *(g for g in grads if g is not None)]

        first = call()
        for _ in range(calls - 1):
            for name, a, b in zip(("value", "d_hidden", "d_weight"), first, call(), strict=False):
                report.require_equal(f"{op}, {name}", a, b)
    report.show(ops=len(OPS), calls=calls)
