"""Figures from benchmark CSVs: `python -m bench.plot bench/h100.csv --out docs/figures`. Draws those for which the CSV has rows.

throughput_by_experts.png, throughput_by_topk.png (sweeps of bench.layer), ceiling.png (fraction of the cuBLAS ceiling by shape and
implementation), roofline.png (bench.kernels), routing.png (routing as a share of the layer), memory.png, step.png (bench.step: where a training
step's time goes).
"""

import argparse
from pathlib import Path

from bench.problem import TARGETS, Shape, kernel_costs
from bench.results import cli, latest, read

COLORS = {
    "triton": "#0b6e4f", "triton, graph": "#6fc3a5", "sonicmoe": "#c8553d", "liger": "#e09f3e", "scattermoe": "#8d6a9f",
    "grouped_mm": "#7d8597", "torch": "#7d8597",
}  # fmt: skip
STYLE = {
    "font.size": 11, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 10, "figure.dpi": 110, "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
}  # fmt: skip
ABOVE = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=7, columnspacing=1.2, handlelength=1.2)
MARKERS = "osD^vPX*"


def shape_of(row):
    return Shape(*(row[letter] for letter in "TDFEK"))


def short(n):
    return f"{n // 1024}k" if n % 1024 == 0 and n >= 8192 else str(n)


def label(shape):
    return f"T {short(shape.T)}\nD {shape.D}, F {shape.F}\nE {shape.E}, K {shape.K}"


def select(rows, **wanted):
    return [
        row
        for row in rows
        if all(row[name] in (value if isinstance(value, tuple) else (value,)) for name, value in wanted.items())
    ]


def finish(fig, title, rows, path):
    title = fig.suptitle(
        f"{title}\n{rows[0]['gpu']}, {rows[0]['dtype']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}",
        fontsize=12,
    )
    fig.set_figwidth(max(fig.get_figwidth(), title.get_window_extent().width / fig.dpi + 0.3))
    fig.savefig(path)
    plt.close(fig)
    print(path)


def throughput(rows, along, out):
    """TFLOP/s of the layer against E (a line per K) or against K (a line per E), a panel per (T, D, F)."""
    other = "K" if along == "E" else "E"
    rows = select(rows, kernel="layer", implementation=("triton", "gemms"), mode="full", routing="softmax")
    panels = {}
    for row in rows:
        panels.setdefault(shape_of(row)[:3], []).append(row)
    panels = {sizes: group for sizes, group in sorted(panels.items()) if len({row[along] for row in group}) > 2}
    if not panels:
        return
    fig, axes = plt.subplots(1, len(panels), figsize=(1 + 4.2 * len(panels), 4.4), sharey=True, squeeze=False)
    values = sorted({row[other] for group in panels.values() for row in group})
    colors = dict(
        zip(values, plt.cm.viridis([0.9 * i / max(1, len(values) - 1) for i in range(len(values))]), strict=True)
    )
    for ax, ((T, D, F), group) in zip(axes[0], panels.items(), strict=True):
        for value in values:
            for name, style in (("gemms", dict(ls=":", lw=1.2)), ("triton", dict(marker="o", ms=5))):
                line = sorted(
                    (row[along], row["tflops"]) for row in select(group, implementation=name, **{other: value})
                )
                if line:
                    ax.plot(
                        *zip(*line, strict=True),
                        color=colors[value],
                        label=f"{other} = {value}" if name == "triton" else None,
                        **style,
                    )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.set_xticks(sorted({row[along] for row in group}))
        ax.minorticks_off()
        ax.set_title(f"T {short(T)}, D {D}, F {F}")
        ax.set_xlabel({"E": "experts E", "K": "experts per token K"}[along])
    axes[0][0].set_ylabel("forward + backward, TFLOP/s")
    axes[0][0].set_ylim(bottom=0)
    axes[0][-1].plot([], [], color="gray", ls=":", lw=1.2, label="cuBLAS, the same FLOPs")
    found = _handles(axes[0])
    names = sorted(found, key=lambda name: (name.startswith("cuBLAS"), len(name), name))  # numbers by size
    axes[0][-1].legend([found[name] for name in names], names, loc="center left", bbox_to_anchor=(1, 0.5))
    finish(fig, f"Expert layer against {'the number of experts' if along == 'E' else 'experts per token'}", rows, out)


def _handles(axes):
    """What the legend of all `axes` together holds: {name: handle}."""
    found = {}
    for ax in axes:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    return found


def bars(ax, shapes, series, digits=0, rotation=0):
    """Grouped bars: series = {name: {shape: value}}, the values written above them."""
    width = 0.84 / len(series)
    for i, (name, values) in enumerate(series.items()):
        xs = [x + (i - (len(series) - 1) / 2) * width for x, shape in enumerate(shapes) if shape in values]
        heights = [values[shape] for shape in shapes if shape in values]
        ax.bar(xs, heights, width * 0.92, color=COLORS.get(name, "#444444"), label=name)
        for x, height in zip(xs, heights, strict=True):
            text = f"{height:,.{digits}f}"
            ax.annotate(
                text,
                (x, height),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9,
                rotation=rotation,
                bbox=dict(facecolor="white", edgecolor="none", pad=0.5),
            )
    ax.set_xticks(range(len(shapes)), [label(shape) for shape in shapes], fontsize=10)
    ax.grid(axis="x", visible=False)


def targets_of(rows):
    """At most 8 shapes to compare side by side: the targets, or the first ones."""
    found = list(dict.fromkeys(shape_of(row) for row in rows))
    return ([shape for shape in TARGETS if shape in found] or found)[:8]


def named(row):
    return row["implementation"] + (", graph" if row["mode"].endswith("-graph") else "")


def in_order(series):
    return {
        name: series[name]
        for name in sorted(series, key=lambda name: list(COLORS).index(name) if name in COLORS else 99)
    }


def ceiling(rows, out):
    rows = [row for row in select(rows, kernel="layer", routing="softmax") if row["ceiling"]]
    shapes = targets_of(rows)
    if not shapes:
        return
    fig, axes = plt.subplots(3, 1, figsize=(1.5 + 1.55 * len(shapes), 8), sharex=True)
    for ax, mode in zip(axes, ("forward", "backward", "full"), strict=True):
        series = {}
        for row in select(rows, mode=(mode, mode + "-graph")):
            series.setdefault(named(row), {})[shape_of(row)] = 100 * row["ceiling"]
        bars(ax, shapes, in_order(series))
        ax.axhline(100, color="black", lw=1)
        ax.set_ylim(0, 112)
        ax.set_ylabel("forward + backward" if mode == "full" else mode)
    found = in_order(_handles(axes))
    axes[0].legend(list(found.values()), list(found), **ABOVE)
    finish(fig, "Expert layer: throughput in % of bare cuBLAS products of the same FLOPs", rows, out)


def roofline(rows, out):
    roof = {row["mode"]: row for row in select(rows, kernel="ceiling")}
    points = [row for row in rows if row["gb_s"] and row["kernel"] in kernel_costs(TARGETS[0])]
    shapes = targets_of(points)
    if not shapes or len(roof) < 2:
        return
    peak, bandwidth = roof["gemm"]["tflops"], roof["copy"]["gb_s"] / 1e3
    fig, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5), width_ratios=(1.7, 1))
    dense = [row for row in points if row["tflops"] and shape_of(row) in shapes]
    kernels = list(dict.fromkeys(row["kernel"] for row in dense))
    for kernel, color in zip(kernels, plt.cm.Dark2.colors, strict=False):
        for row in select(dense, kernel=kernel):
            marker = MARKERS[shapes.index(shape_of(row))]
            left.scatter(
                row["tflops"] * 1e3 / row["gb_s"],
                row["tflops"],
                color=color,
                marker=marker,
                s=48,
                edgecolor="white",
                lw=0.5,
                zorder=3,
            )
        left.scatter([], [], color=color, label=kernel)
    for shape, marker in zip(shapes, MARKERS, strict=False):
        left.scatter(
            [], [], color="gray", marker=marker, label=f"{short(shape.T)}, {shape.D}, {shape.F}, {shape.E}, {shape.K}"
        )
    ridge = peak / bandwidth
    xs = [row["tflops"] * 1e3 / row["gb_s"] for row in dense] + [ridge]
    left.plot([min(xs) / 1.5, ridge, max(xs) * 1.5], [min(xs) / 1.5 * bandwidth, peak, peak], color="black", lw=1.2)
    left.annotate(
        f"{peak:.0f} TFLOP/s, cuBLAS", (max(xs) * 1.5, peak), (0, 4), textcoords="offset points", ha="right", fontsize=9
    )
    middle = (min(xs) * ridge) ** 0.5
    left.annotate(
        f"{bandwidth:.2f} TB/s, copy",
        (middle, middle * bandwidth),
        (-6, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    left.set(xscale="log", yscale="log", xlabel="arithmetic intensity, FLOP per byte", ylabel="TFLOP/s")
    left.set_title("matrix kernels (legend: T, D, F, E, K)")
    left.legend(loc="lower right", fontsize=8.5, ncols=2)
    for axis, ticks in ((left.xaxis, (25, 50, 100, 200, 400, 800, 1600)), (left.yaxis, (50, 100, 200, 400, 800))):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    moved = [row for row in points if not row["tflops"] and shape_of(row) in shapes]
    names = list(dict.fromkeys(row["kernel"] for row in moved))
    for row in moved:
        right.scatter(
            row["gb_s"] / 1e3,
            names.index(row["kernel"]),
            color="gray",
            marker=MARKERS[shapes.index(shape_of(row))],
            s=40,
        )
    right.axvline(bandwidth, color="black", lw=1.2)
    right.set_yticks(range(len(names)), names)
    right.set(xlim=(0, bandwidth * 1.1), ylim=(len(names) - 0.5, -0.5), xlabel="TB/s of the fewest bytes (line: copy)")
    right.set_title("kernels that move data")
    finish(fig, "Kernels against their rooflines", points, out)


def routing(rows, out):
    layer = {
        shape_of(row): row["p50_ms"]
        for row in select(rows, kernel="layer", implementation="triton", mode="full", routing="softmax")
    }
    series, shapes = {}, targets_of([row for row in select(rows, kernel="routing") if shape_of(row) in layer])
    for row in select(rows, kernel="routing", mode=("full", "full-graph")):
        if shape_of(row) in shapes:
            series.setdefault(named(row), {})[shape_of(row)] = 100 * row["p50_ms"] / layer[shape_of(row)]
    if not series:
        return
    fig, ax = plt.subplots(figsize=(1.5 + 1.55 * len(shapes), 4))
    bars(ax, shapes, in_order(series), digits=1)
    ax.set_ylabel("time, % of our expert layer")
    ax.legend(**ABOVE)
    finish(fig, "Router, top-k, statistics and sort, forward + backward", select(rows, kernel="routing"), out)


def memory(rows, out):
    rows = [row for row in select(rows, kernel="layer", mode="full", routing="softmax") if row["saved_mib"]]
    shapes = targets_of(rows)
    if not shapes:
        return
    fig, axes = plt.subplots(2, 1, figsize=(1.5 + 1.55 * len(shapes), 7.5), sharex=True)
    for ax, column, title in zip(
        axes, ("saved_mib", "peak_mib"), ("kept for backward, MiB", "peak above inputs, MiB"), strict=True
    ):
        series = {}
        for row in rows:
            series.setdefault(named(row), {})[shape_of(row)] = row[column]
        bars(ax, shapes, in_order(series), rotation=90)
        ax.set_ylabel(title)
        ax.margins(y=0.2)
    axes[0].legend(**ABOVE)
    finish(fig, "Memory of one expert layer", rows, out)


PARTS = {  # of a step: a colour, and how the names of its families begin
    "expert GEMMs": (
        "#0b6e4f",
        ("experts: up", "experts: rows", "experts: dswiglu", "experts: dw", "experts: grouped_mm"),
    ),
    "sort, sums, router": ("#6fc3a5", ("experts:", "router")),
    "attention": ("#c8553d", ("attention",)),
    "projections, dense MLP": ("#e09f3e", ("attention projections", "experts: torch")),
    "norms, rotations, activations": ("#8d6a9f", ("norms", "weight casts")),
    "head and loss": ("#4a6fa5", ("lm head",)),
    "optimiser, gradient norm": ("#7d8597", ("optimiser", "gradient")),
    "other": ("#cccccc", ("",)),
}


def part_of(family):
    """The part whose prefix of the family's name is the longest."""
    return max(
        PARTS,
        key=lambda part: max((len(prefix) + 1 for prefix in PARTS[part][1] if family.startswith(prefix)), default=0),
    )


def step(rows, out):
    """A bar per model: microseconds per 1,024 tokens, by part."""
    rows = select(rows, kernel="step-family")
    models = list(dict.fromkeys((row["implementation"], shape_of(row)) for row in rows))
    if not models:
        return
    bars_of = {}
    for name, shape in models:
        bars_of[name, shape] = parts = dict.fromkeys(PARTS, 0.0)
        for row in select(rows, implementation=name, **shape._asdict()):
            parts[part_of(row["mode"])] += 1e3 * row["p50_ms"] / (shape.T / 1024)
    fig, ax = plt.subplots(figsize=(11, 1.6 + 0.62 * len(models)))
    numbers = []
    for y, parts in enumerate(bars_of.values()):
        left = 0.0
        for part, width in parts.items():
            bar = ax.barh(y, width, left=left, color=PARTS[part][0], label=part if y == 0 else None, edgecolor="white")
            numbers += [(*bar, *ax.bar_label(bar, fmt="%.0f", label_type="center", fontsize=9, color="white"))]
            left += width
    kind = lambda name, s: "dense" if name.startswith("dense") else f"E {s.E}"  # noqa: E731
    other = lambda name: "" if (impl := name.split(":")[1]) in ("auto", "triton") else f"\n{impl}"  # noqa: E731
    names = [
        f"D {s.D}, F {s.F}, K {s.K}, {kind(name, s)}{other(name)}" + "\nbfloat16 weights" * ("bfloat16-weights" in name)
        for name, s in models
    ]
    ax.set_yticks(range(len(models)), names)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("microseconds of GPU time per 1,024 tokens")
    fig.legend(loc="outside lower center", ncols=4)
    fig.draw_without_rendering()  # gives the bars their widths in pixels
    for bar, number in numbers:
        number.set_visible(number.get_window_extent().width + 6 < bar.get_window_extent().width)
    finish(fig, "Where a training step's time goes", rows, out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."), help="directory of the PNGs")
    parser.add_argument("--gpu", default="", help="part of the GPU's name, when the files hold several")
    args = parser.parse_args(argv)
    global plt  # imported here, so that without matplotlib the command line says what to install
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in latest(row for path in args.csv for row in read(path)).values() if args.gpu in row["gpu"]]
    if len(gpus := {row["gpu"] for row in rows}) != 1:
        raise SystemExit(f"rows of {len(gpus)} GPUs {sorted(gpus)}: choose one with --gpu")
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        throughput(rows, "E", args.out / "throughput_by_experts.png")
        throughput(rows, "K", args.out / "throughput_by_topk.png")
        ceiling(rows, args.out / "ceiling.png")
        roofline(rows, args.out / "roofline.png")
        routing(rows, args.out / "routing.png")
        memory(rows, args.out / "memory.png")
        step(rows, args.out / "step.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
