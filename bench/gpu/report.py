"""report.md: tables of what was measured, and a list of what was not, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.gpu import ranking
from bench.gpu.device import StandIn
from bench.gpu.job import Outcome
from bench.gpu.operators import SHAPES, variants
from bench.gpu.stages import PREPARED
from bench.step import PHASES

Outcomes = dict[tuple[str, str], Outcome]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; columns but the first are right-aligned."""
    lines = [" | ".join(header), " | ".join(["---"] + ["---:"] * (len(header) - 1))]
    lines += [" | ".join(row) for row in rows]
    return [f"| {line} |" for line in lines] + [""]


def _good(outcomes: Outcomes, stage: str) -> dict[str, dict[str, Any]]:
    return {o.name: o.result for o in outcomes.values() if o.stage == stage and o.status == "ok"}


def title(header: dict[str, Any]) -> list[str]:
    """Device, machine, revision and date."""
    lines = [f"# {header.get('device', 'unknown device')}", ""]
    if header.get("rehearsal"):
        lines += ["**A rehearsal on a CPU: no figure here comes from a GPU.** Stand-ins:", ""]
        lines += [f"- {one}" for one in StandIn.stands_for] + [""]
    lines += [f"{header.get('machine', '')}; {header.get('date', '')}", ""]
    return lines


def smoke(outcomes: Outcomes) -> list[str]:
    found = _good(outcomes, "smoke")
    rows = []
    for name, result in found.items():
        if name == "environment":
            continue
        values = result.get("errors", result)
        said = ", ".join(f"{k} {_short(v)}" for k, v in values.items() if not isinstance(v, dict))
        rows.append((name, said))
    return ["## Smoke", "", *markdown(("", "errors against float64, or what was found"), rows)]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def operators(outcomes: Outcomes) -> list[str]:
    """Device and host time of each variant, and ours against the time the least bytes need."""
    found = _good(outcomes, "operators")
    copy = _good(outcomes, "smoke").get("limits", {}).get("copy GB/s")
    lines = ["## Operators", ""]
    lines += ["Microseconds on the device, data caches cold; forward / backward. The limit is the "
              "least possible bytes at the rate of a copy.", ""]  # fmt: skip
    columns = ("", "device us", "host us, both", "extra MiB", "GB/s", "of a copy", "over the limit",
               "against ours", "predicted us")  # fmt: skip
    for shape, about in SHAPES.items():
        ours = found.get(f"{shape}: ours")
        rows = []
        for variant in variants(shape):
            result = found.get(f"{shape}: {variant}")
            if result is not None:
                predicted = about.predicted if variant == "ours" else None
                rows.append(_operator_row(variant, result, ours, copy, predicted))
        if rows:
            sizes = ", ".join(f"{k} {v}" for k, v in about.shape.items())
            lines += [f"### {shape}", "", sizes, "", *markdown(columns, rows)]
    return lines


def _operator_row(
    variant: str,
    result: dict[str, Any],
    ours: dict[str, Any] | None,
    copy: float | None,
    predicted: tuple[str, str] | None,
) -> tuple[str, ...]:
    times = (result["forward"]["us"], result["backward us"])
    cells = [variant, " / ".join(f"{t:.1f}" for t in times), f"{result['both']['host us']:.0f}"]
    cells.append(f"{result['extra MiB']:.0f}")
    least = result.get("least bytes")
    if least and variant == "ours":
        rates = [b / t / 1e3 if t > 0 else 0.0 for b, t in zip(least, times, strict=True)]
        cells.append(" / ".join(f"{r:.0f}" for r in rates))
        cells.append(" / ".join(f"{r / copy:.0%}" for r in rates) if copy else "-")
        cells.append(" / ".join(f"{copy / r:.2f}x" if copy and r else "-" for r in rates))
    else:
        cells += ["-", "-", "-"]
    cells.append(f"{result['both']['us'] / ours['both']['us']:.2f}x" if ours else "-")
    cells.append(" / ".join(predicted) if predicted else "-")
    note = result["both"].get("note")
    return (f"{variant} ({note})" if note else variant, *cells[1:])


def tests(outcomes: Outcomes) -> list[str]:
    found = _good(outcomes, "tests")
    passed = sum(result.get("passed", 0) for result in found.values())
    skipped: dict[str, int] = {}
    for result in found.values():
        for reason, count in result.get("skipped", {}).items():
            skipped[reason] = skipped.get(reason, 0) + count
    rows = [("passed", str(passed))]
    stopped = sum(bool(result.get("stopped")) for result in found.values())
    rows += [("parts that ran out of time", str(stopped))] if stopped else []
    rows += [(f"skipped: {reason}", str(count)) for reason, count in sorted(skipped.items())]
    return ["## Tests", "", *markdown(("", "tests"), rows)]


def step(outcomes: Outcomes) -> list[str]:
    """Images per second, phases, host time, and peak memory beside the predicted one."""
    found = _good(outcomes, "step")
    columns = ("", "images/s", "ms", *PHASES, "host ms", "peak MiB", "predicted MiB", "first s")
    rows = []
    for name, result in found.items():
        if "images/s" not in result:
            continue
        network, _, variant = name.partition(": ")
        side = variant.partition(",")[0]
        predicted = found.get(f"{network}: predicted memory", {}).get(side)
        cells = [name, f"{result['images/s']:.1f}", f"{result['total']:.1f}"]
        cells += [f"{result['phases'][phase]:.1f}" for phase in PHASES]
        cells += [f"{result['host']:.1f}", f"{result['peak_mib']:.0f}"]
        eager = predicted is not None and variant.endswith("eager")
        cells += [f"{predicted:.0f}" if eager else "-", f"{result['first']:.1f}"]
        rows.append(cells)
    return ["## Training step", "", *markdown(columns, rows)]


def tune(outcomes: Outcomes) -> list[str]:
    """The fastest configuration of each pass against the plan's own, and what was left out."""
    rows, left_out = [], []
    for _, one in ranking.measured(outcomes):
        about = one["problem"]
        given = {**about["options"], **about["sizes"]}.items()
        said = (key if value is True else f"{key}{value}" for key, value in given if value)
        name = f"{about['name']}, {' '.join(said)}"
        configs, best = one["configs"], ranking.best(one)
        times = [configs.get(which, {}).get("us") for which in (one["default"], best)]
        cells = [f"{us:.1f}" if us is not None else "-" for us in times]
        ratio = f"{times[0] / times[1]:.2f}x" if None not in times and times[1] else "-"
        rows.append((name, one["default"], cells[0], best or "none", cells[1], ratio))
        left_out += [
            f"- {name}: {c}: {row['reason']}" for c, row in configs.items() if "us" not in row
        ]
    lines = ["## Configurations", "", "Microseconds of a pass, data caches cold.", ""]
    columns = ("", "the plan's own", "us", "fastest", "us", "faster")
    lines += markdown(columns, rows)
    return lines + (["Left out:", "", *left_out, ""] if left_out else [])


def profile(outcomes: Outcomes) -> list[str]:
    found = _good(outcomes, "profile")
    names = ("us", "memory %", "multiprocessor %", "tensor %", "occupancy %", "registers")
    rows = []
    for name, result in found.items():
        for kernel in result.get("kernels", ()):
            cells = [f"{name}: {kernel['kernel']}"]
            cells += [f"{kernel[n]:.1f}" if n in kernel else "-" for n in names]
            stalls = kernel["stalls"].items()
            rows.append((*cells, ", ".join(f"{k} {v:.1f}" for k, v in stalls) or "-"))
    clean = [name for name, result in found.items() if "errors" in result]
    lines = ["## Profile", "", *markdown(("", *names, "largest stalls"), rows)]
    return lines + ([f"No error: {', '.join(clean)}.", ""] if clean else [])


def train(outcomes: Outcomes) -> list[str]:
    found = _good(outcomes, "train")
    names = ("seconds", "step", "images/s", "miou", "pixel_accuracy", "error")
    rows = [(name, *(_short(result.get(n, "-")) for n in names)) for name, result in found.items()]
    return ["## Training", "", *markdown(("", *names), rows)]


def missing(outcomes: Outcomes) -> list[str]:
    """Everything that failed, the worst first."""
    order = ("wrong", "failed", "timed out", "does not fit", "left out")
    good = {o.name for o in outcomes.values() if o.status == "ok"}
    # If a variant was measured, it does not matter that compiling it ahead failed.
    bad = [
        o for o in outcomes.values()
        if o.status != "ok" and o.name.removesuffix(PREPARED) not in good
    ]  # fmt: skip
    bad.sort(key=lambda outcome: order.index(outcome.status))
    if not bad:
        return []
    lines = ["## Not measured", ""]
    lines += [f"- {o.status}: {o.stage}, {o.name}: {o.reason}" for o in bad]
    return [*lines, ""]


_SECTIONS: dict[str, Callable[[Outcomes], list[str]]] = {
    "smoke": smoke,
    "operators": operators,
    "tests": tests,
    "step": step,
    "tune": tune,
    "profile": profile,
    "train": train,
}


def whole(header: dict[str, Any], outcomes: Outcomes) -> str:
    """The report as Markdown."""
    lines = title(header) + missing(outcomes)
    done = {outcome.stage for outcome in outcomes.values()}
    for stage, section in _SECTIONS.items():
        if stage in done:
            lines += section(outcomes)
    return "\n".join(lines).rstrip() + "\n"
