"""The picture of several runs: latencies and goodput over the rate, a line for each policy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream.config import ConfigError, SetupError
from slipstream.simulate.config import SimulateConfig
from slipstream.simulate.report import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(name: str) -> None:
    """ConfigError, SetupError: no plot can be written."""
    if Path(name).suffix not in SUFFIXES:
        raise ConfigError(
            f"slipstream simulate: --plot: expected a name in {', '.join(SUFFIXES)}, got {name}"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SetupError(
            "slipstream simulate: --plot needs matplotlib: pip install 'slipstream[simulate]'"
        ) from None


def write_plot(name: str, summaries: Sequence[Summary], config: SimulateConfig) -> None:
    """SetupError: the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (ttft, itl), (good, hits) = figure.subplots(2, 2)
    _lines(ttft, summaries, "TTFT, s", lambda s: s.ttft_s.p50, lambda s: s.ttft_s.p90)
    ttft.axhline(config.ttft_limit_s, color="grey", linewidth=0.8, linestyle=":")
    ttft.set_yscale("log")
    _lines(itl, summaries, "ITL, ms", lambda s: s.itl_s.p50 * 1e3, lambda s: s.itl_s.p99 * 1e3)
    itl.axhline(config.itl_limit_s * 1e3, color="grey", linewidth=0.8, linestyle=":")
    _lines(good, summaries, "requests inside both limits, %", lambda s: s.good_share * 100)
    good.axhline(config.good_share * 100, color="grey", linewidth=0.8, linestyle=":")
    _lines(hits, summaries, "prompt blocks hit, %", lambda s: s.hit_share * 100)
    perfect = max(summary.reusable_share for summary in summaries) * 100
    hits.axhline(perfect, color="grey", linewidth=0.8, linestyle=":", label="perfect reuse")
    ttft.set_title("p50 solid, p90 dashed", fontsize="small")
    itl.set_title("p50 solid, p99 dashed", fontsize="small")
    hits.legend(fontsize="small")
    what = Path(config.trace).name or f"synthetic, {config.synthetic} requests"
    figure.suptitle(f"{what}: {config.workers} workers, {config.step_model}")
    try:
        figure.savefig(name, dpi=120)
    except OSError as error:
        raise SetupError(f"slipstream simulate: --plot: {name}: {error.strerror}") from None


def _lines(
    axes: "Axes",
    summaries: Sequence[Summary],
    label: str,
    solid: Callable[[Summary], float],
    dashed: Callable[[Summary], float] | None = None,
) -> None:
    kinds = dict.fromkeys((summary.policy, summary.disaggregation) for summary in summaries)
    for index, kind in enumerate(kinds):
        runs = [s for s in summaries if (s.policy, s.disaggregation) == kind]
        rates = [summary.offered_per_s for summary in runs]
        colour = f"C{index}"
        axes.plot(rates, [solid(s) for s in runs], "o-", color=colour, label=", ".join(kind))
        if dashed is not None:
            axes.plot(rates, [dashed(s) for s in runs], "--", color=colour)
    axes.set_xlabel("requests per second")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
