"""Figures from benchmark CSVs: `python -m bench.plot docs/runs/bench-h100.csv --out=docs/figures`.

Draws those for which the CSV has rows: ceiling.png, throughput_by_experts.png (bench.layer and its sweeps) and step.png
(bench.step).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.problem import TARGETS
from bench.results import cli, latest, read, shape_of
from optimoe import config

STYLE = {"axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "font.size": 11}
IMPLEMENTATIONS = ("triton", "triton, graph", "sonicmoe", "liger", "transformers", "grouped_mm")
# Part of a step: how the names of its families begin.
PARTS = {
    "expert GEMMs": [f"experts: {name}" for name in ("up", "rows", "dswiglu", "dw", "grouped_mm")],
    "sort, sums, router": ["experts:", "router"],
    "attention": ["attention"],
    "projections, dense MLP": ["attention projections", "experts: torch"],
    "norms, rotations, activations": ["norms", "weight casts"],
    "head and loss": ["lm head"],
    "optimiser, gradient norm": ["optimiser", "gradient"],
    "other": [""],
}


def short(n):
    return f"{n // 1024}k" if n % 1024 == 0 and n >= 8192 else str(n)


def label(shape):
    return f"T {short(shape.T)}\nD {shape.D}, F {shape.F}\nE {shape.E}, K {shape.K}"


def select(rows, **wanted):
    """The rows whose columns have the wanted value, or one of a tuple of values."""
    allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in wanted.items()}
    return [row for row in rows if all(row[name] in values for name, values in allowed.items())]


def figure(plt, size, title, rows, n_rows=1, n_columns=1, **options):
    """(figure, axes as a list) with the title and the machine above; wide enough for both."""
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained", **options)
    machine = f"{rows[0]['gpu']}, {rows[0]['dtype']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}"
    title = fig.suptitle(f"{title}\n{machine}", fontsize=12)
    fig.set_figwidth(max(size[0], title.get_window_extent().width / fig.dpi + 0.3))
    return fig, list(axes.flat)


def throughput(plt, rows):
    """TFLOP/s of the layer against E, a line per K, a panel per (T, D, F)."""
    panels = {}
    for row in select(rows, kernel="layer", implementation=("triton", "gemms"), mode="full", routing="softmax"):
        panels.setdefault(shape_of(row)[:3], []).append(row)
    panels = {sizes: group for sizes, group in sorted(panels.items()) if len({row["E"] for row in group}) > 2}
    if not panels:
        return None
    everything = [row for group in panels.values() for row in group]
    size, title = (1 + 4.2 * len(panels), 4.4), "Expert layer against the number of experts"
    fig, axes = figure(plt, size, title, everything, n_columns=len(panels), sharey=True)
    values = sorted({row["K"] for row in everything})
    for ax, ((T, D, F), group) in zip(axes, panels.items(), strict=True):
        for i, K in enumerate(values):
            for name, style in (("gemms", dict(ls=":", lw=1.2)), ("triton", dict(marker="o", lw=2))):
                points = sorted((r["E"], r["tflops"]) for r in select(group, implementation=name, K=K))
                color = plt.cm.viridis(0.9 * i / max(1, len(values) - 1))
                ax.plot(*zip(*points, strict=True) if points else ((), ()), color=color, **style)
        ax.set_xscale("log", base=2)
        ticks = sorted({row["E"] for row in group})
        ax.set_xticks(ticks, map(str, ticks))
        ax.set(title=f"T {short(T)}, D {D}, F {F}", xlabel="experts E")
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("forward + backward, TFLOP/s")
    names = [f"K = {value}" for value in values] + ["cuBLAS, the same FLOPs"]
    lines = axes[-1].lines
    axes[-1].legend([*lines[1::2], lines[0]], names, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def ceiling(plt, rows):
    """Grouped bars of each implementation's percentage of bare cuBLAS products."""
    rows = [row for row in select(rows, kernel="layer", routing="softmax") if row["ceiling"]]
    found = list(dict.fromkeys(map(shape_of, rows)))
    shapes = ([shape for shape in TARGETS if shape in found] or found)[:8]
    if not shapes:
        return None
    title = "Expert layer: throughput in % of bare cuBLAS products of the same FLOPs"
    fig, axes = figure(plt, (1.5 + 1.55 * len(shapes), 8), title, rows, n_rows=3, sharex=True)
    named = lambda row: row["implementation"] + ", graph" * row["mode"].endswith("-graph")  # noqa: E731
    names = [name for name in IMPLEMENTATIONS if name in map(named, rows)]
    width = 0.84 / max(1, len(names))
    for ax, mode in zip(axes, ("forward", "backward", "full"), strict=True):
        bars = {(named(r), shape_of(r)): 100 * r["ceiling"] for r in select(rows, mode=(mode, f"{mode}-graph"))}
        for i, name in enumerate(names):
            values = {x + (i + 0.5) * width - 0.42: bars.get((name, shape)) for x, shape in enumerate(shapes)}
            values = {x: value for x, value in values.items() if value}
            bar = ax.bar(
                values.keys(), values.values(), width * 0.92, color=f"C{IMPLEMENTATIONS.index(name)}", label=name
            )
            ax.bar_label(bar, fmt="%.0f", fontsize=9)
        ax.axhline(100, color="black", lw=1)
        ax.set(ylim=(0, 112), ylabel="forward + backward" if mode == "full" else mode)
        ax.set_xticks(range(len(shapes)), map(label, shapes), fontsize=10)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=7, columnspacing=1.2)
    return fig


def part_of(family):
    """The part of PARTS whose prefix of the family's name is the longest."""
    return max((len(prefix), part) for part in PARTS for prefix in PARTS[part] if family.startswith(prefix))[1]


def model_label(name, shape):
    kind, impl, *weights = name.split(":")
    text = f"D {shape.D}, F {shape.F}, K {shape.K}, " + ("dense" if kind == "dense" else f"E {shape.E}")
    return text + f"\n{impl}" * (impl not in ("auto", "triton")) + "\nbfloat16 weights" * bool(weights)


def step(plt, rows):
    """A bar per model: microseconds per 1,024 tokens, by part."""
    rows = select(rows, kernel="step-family")
    models = list(dict.fromkeys((row["implementation"], shape_of(row)) for row in rows))
    if not models:
        return None
    fig, (ax,) = figure(plt, (11, 1.6 + 0.62 * len(models)), "Where a training step's time goes", rows)
    for y, (name, shape) in enumerate(models):
        left, parts = 0.0, dict.fromkeys(PARTS, 0.0)
        for row in select(rows, implementation=name, **shape._asdict()):
            parts[part_of(row["mode"])] += 1e3 * row["p50_ms"] / (shape.T / 1024)
        for part, width in parts.items():
            bar = ax.barh(y, width, left=left, color=f"C{list(PARTS).index(part)}", label=part if y == 0 else None)
            if width > 0.03 * sum(parts.values()):  # numbers in narrower bars would overlap
                ax.bar_label(bar, fmt="%.0f", label_type="center", fontsize=9, color="white")
            left += width
    ax.set_yticks(range(len(models)), [model_label(*model) for model in models])
    ax.invert_yaxis()
    ax.set_xlabel("microseconds of GPU time per 1,024 tokens")
    fig.legend(loc="outside lower center", ncols=4)
    return fig


@dataclass(frozen=True)
class Config:
    POSITIONAL: ClassVar = ("files",)
    files: tuple[str, ...]  # CSVs; the last of equal rows counts
    out: str = "."  # directory of the pictures
    gpu: str = ""  # part of the GPU's name, when the files hold several


def main(argv=None):
    cfg = config.parse(Config, argv, __doc__)
    import matplotlib  # here, so that without it the command line says what to install

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in latest(row for path in cfg.files for row in read(path)).values() if cfg.gpu in row["gpu"]]
    gpus = sorted({row["gpu"] for row in rows})
    config.require(len(gpus) == 1, "gpu", cfg.gpu, f"the files have rows of {gpus}; choose one")
    out = config.make_directory(cfg.out, "out", cfg.out)
    pictures = {"throughput_by_experts": throughput, "ceiling": ceiling, "step": step}
    with plt.rc_context(STYLE):
        for name, draw in pictures.items():
            if fig := draw(plt, rows):
                fig.savefig(Path(out, f"{name}.png"), dpi=110)
                plt.close(fig)
                print(Path(out, f"{name}.png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli(main))
