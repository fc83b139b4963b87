"""Figures from benchmark CSVs: `python -m bench.plot docs/runs/s*-h200.csv --out=docs/figures`.

Draws those for which the CSV has rows: ceiling.png, throughput_by_experts.png, throughput_by_k.png (bench.layer) and
step.png (bench.step).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from bench.problem import TARGETS
from bench.rows import latest, read, shape_of
from optimoe import config

STYLE = {"axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "font.size": 11}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}
COLORS = {
    "triton": "#1f5f99",
    "triton, graph": "#7fb2dd",
    "sonicmoe": "#d08a3c",
    "liger": "#a86bb0",
    "grouped_mm": "#8c8c8c",
}
# Part of a step: (its colour, prefixes of its families' names).
PARTS = {
    "expert GEMMs": ("#1f5f99", [f"experts: {name}" for name in ("up", "rows", "dswiglu", "dw", "grouped_mm")]),
    "sort, sums, router": ("#7fb2dd", ["experts:", "router"]),
    "attention": ("#c0504d", ["attention"]),
    "projections, dense MLP": ("#d08a3c", ["attention projections", "experts: torch"]),
    "norms, rotations, activations": ("#6f9b63", ["norms", "weight casts"]),
    "head and loss": ("#a86bb0", ["lm head"]),
    "optimiser, gradient norm": ("#8c8c8c", ["optimiser", "gradient"]),
    "other": ("#d0d0d0", [""]),
}


def short(n):
    return f"{n // 1024}k" if n % 1024 == 0 and n >= 8192 else str(n)


def select(rows, **wanted):
    """The rows whose columns have the wanted value, or one of a tuple of values."""
    allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in wanted.items()}
    return [row for row in rows if all(row[name] in values for name, values in allowed.items())]


def newest(rows, key):
    """Of the rows with the same key(row), those of the revision that was measured last."""
    last = {}
    for row in rows:
        last[key(row)] = max(last.get(key(row), ("", "")), (row["date"], row["revision"]))
    return [row for row in rows if row["revision"] == last[key(row)][1]]


def figure(plt, size, title, rows, n_columns=1):
    """(figure, list of axes) under the title and the machine, wide enough for both."""
    fig, axes = plt.subplots(1, n_columns, figsize=size, squeeze=False, layout="constrained", sharey=True)
    machine = f"{rows[0]['gpu']}, {rows[0]['dtype']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}"
    title = fig.suptitle(f"{title}\n{machine}", fontsize=12)
    fig.set_figwidth(max(size[0], title.get_window_extent().width / fig.dpi + 0.3))
    return fig, list(axes.flat)


SIZES = {"E": "experts E", "K": "experts per token K"}


def throughput(plt, rows, x, line):
    """TFLOP/s of the layer against `x`. x and `line` are the two SIZES: a line per value, a panel per (T, D, F)."""
    panels = {}
    for row in select(rows, kernel="layer", implementation=("triton", "gemms"), mode="full", routing="softmax"):
        panels.setdefault(shape_of(row)[:3], []).append(row)
    panels = {sizes: group for sizes, group in sorted(panels.items()) if len({row[x] for row in group}) > 2}
    if not panels:
        return None
    everything = [row for group in panels.values() for row in group]
    size, title = (2.6 + 4 * len(panels), 4.4), f"Expert layer against the number of {SIZES[x]}"
    fig, axes = figure(plt, size, title, everything, n_columns=len(panels))
    values = sorted({row[line] for row in everything})
    for ax, ((T, D, F), group) in zip(axes, panels.items(), strict=True):
        for i, value in enumerate(values):
            for name, style in (("gemms", dict(ls=":", lw=1.2)), ("triton", dict(marker="o", lw=2))):
                points = sorted((r[x], r["tflops"]) for r in group if r["implementation"] == name and r[line] == value)
                color = plt.cm.viridis(0.9 * i / max(1, len(values) - 1))
                ax.plot([at for at, _ in points], [tflops for _, tflops in points], color=color, **style)
        ax.set_xscale("log", base=2)
        ticks = sorted({row[x] for row in group})
        ax.set_xticks(ticks, map(str, ticks))
        ax.set(title=f"T {short(T)}, D {D}, F {F}", xlabel=SIZES[x])
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("forward + backward, TFLOP/s")
    names = [f"{line} = {value}" for value in values] + ["cuBLAS, the same FLOPs"]
    lines = axes[-1].lines
    axes[-1].legend([*lines[1::2], lines[0]], names, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def ceiling(plt, rows):
    """Bars of each implementation's percentage of bare cuBLAS products, forward + backward."""
    rows = newest(select(rows, kernel="layer", mode=("full", "full-graph"), routing="softmax"), shape_of)
    bars = {}
    for row in rows:
        name = row["implementation"] + (", graph" if row["mode"] == "full-graph" else "")
        if row["ceiling"] and name in COLORS:
            bars[name, shape_of(row)] = 100 * row["ceiling"]
    found = list(dict.fromkeys(shape for _, shape in bars))
    shapes = ([shape for shape in TARGETS if shape in found] or found)[:8]
    if not shapes:
        return None
    title = "Expert layer, forward + backward, against bare cuBLAS products of the same FLOPs"
    fig, (ax,) = figure(plt, (1.5 + 1.55 * len(shapes), 4.2), title, rows)
    names = [name for name in COLORS if any((name, shape) in bars for shape in shapes)]
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        heights = [bars.get((name, shape), 0) for shape in shapes]
        places = [x + (i + 0.5) * width - 0.42 for x in range(len(shapes))]
        bar = ax.bar(places, heights, width * 0.92, color=COLORS[name], label=name)
        ax.bar_label(bar, [f"{height:.0f}" if height else "" for height in heights], fontsize=9)
    ax.axhline(100, color="black", lw=1, zorder=0)
    ax.set(ylim=(0, 115), ylabel="TFLOP/s in % of cuBLAS")
    ax.grid(False, axis="x")
    labels = [f"T {short(T)}\nD {D}, F {F}\nE {E}, K {K}" for T, D, F, E, K in shapes]
    ax.set_xticks(range(len(shapes)), labels, fontsize=10)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, columnspacing=1.2)
    return fig


def part_of(family):
    """The part of PARTS with the longest prefix of the family's name."""
    prefixes = {prefix: part for part, (_, beginnings) in PARTS.items() for prefix in beginnings}
    return prefixes[max(filter(family.startswith, prefixes), key=len)]


def step(plt, rows):
    """A bar per model with our kernels: microseconds per 1,024 tokens, by part."""
    models = {}
    # Another revision's families may have other names and would be added to these.
    families = newest(select(rows, kernel="step-family"), lambda row: (row["implementation"], shape_of(row)))
    for row in families:
        shape = shape_of(row)
        kind, impl, *weights = row["implementation"].split(":")
        if impl not in ("auto", "triton"):
            continue
        label = f"D {shape.D}, F {shape.F}, K {shape.K}, {'dense' if kind == 'dense' else f'E {shape.E}'}"
        parts = models.setdefault((shape, "\n".join([label, *weights])), dict.fromkeys(PARTS, 0.0))
        parts[part_of(row["mode"])] += 1e3 * row["p50_ms"] / (shape.T / 1024)
    if not models:
        return None
    size = (11, 1.8 + 0.55 * len(models))
    fig, (ax,) = figure(plt, size, "Where the time of a training step goes", families)
    longest = max(sum(parts.values()) for parts in models.values())
    for y, parts in enumerate(models.values()):
        left = 0.0
        for part, width in parts.items():
            bar = ax.barh(y, width, left=left, color=PARTS[part][0], label=part if y == 0 else None)
            if width > 0.04 * longest:  # numbers in narrower bars would overlap
                ax.bar_label(bar, fmt="%.0f", label_type="center", fontsize=9, color="white")
            left += width
    ax.set_yticks(range(len(models)), [label for _, label in models])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("microseconds of GPU time per 1,024 tokens")
    fig.legend(loc="outside lower center", ncols=4)
    return fig


@dataclass(frozen=True)
class Config:
    POSITIONAL: ClassVar = ("files",)
    files: tuple[str, ...]  # CSVs; of rows for the same measurement the last counts
    out: str = "."  # directory of the pictures
    gpu: str = ""  # part of the GPU's name, when the files hold several


def main(argv=None):
    cfg = config.parse(Config, argv, __doc__)
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib: pip install -e '.[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = latest(row for path in cfg.files for row in read(path)).values()
    gpus = sorted({row["gpu"] for row in rows})
    chosen = [gpu for gpu in gpus if cfg.gpu in gpu]
    config.require(len(chosen) == 1, "gpu", cfg.gpu, f"must fit one of: {', '.join(gpus) or 'no rows at all'}")
    rows = select(rows, gpu=chosen[0])
    out = config.make_directory(cfg.out, "out", cfg.out)
    pictures = {
        "throughput_by_experts": partial(throughput, x="E", line="K"),
        "throughput_by_k": partial(throughput, x="K", line="E"),
        "ceiling": ceiling,
        "step": step,
    }
    with plt.rc_context(STYLE):
        for name, draw in pictures.items():
            if fig := draw(plt, rows):
                fig.savefig(Path(out, f"{name}.png"), dpi=110)
                plt.close(fig)
                print(Path(out, f"{name}.png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(config.command_line(main))
