"""The figures as JSON, as Markdown tables and as a chart."""

import json
from pathlib import Path

from bench.contenders import OURS, TEXTBOOK

MIB = 2**20

# figure -> heading, factor to the unit shown, digits after the point
COLUMNS = {
    "tokens_per_s": ("tokens/s", 1, 0),
    "first_median": ("first token, ms", 1000, 0),
    "first_p95": ("p95", 1000, 0),
    "between_median": ("between tokens, ms", 1000, 1),
    "between_p95": ("p95", 1000, 1),
    "health_median": ("GET /health, ms", 1000, 0),
    "health_p95": ("p95", 1000, 0),
    "cpu_per_token": ("CPU ms/token", 1000, 1),
    "peak_memory": ("peak MiB", 1 / MIB, 0),
    "bytes_per_answer": ("bytes/answer", 1, 0),
    "load_share": ("load, cores", 1, 2),
    "failed": ("failed", 1, 0),
}
# What is compared, and whether more is better.
RATIOS = {
    "tokens_per_s": True,
    "first_median": False,
    "between_p95": False,
    "health_p95": False,
    "cpu_per_token": False,
    "peak_memory": False,
}


def shown(figure: float | None, factor: float, digits: int) -> str:
    return "–" if figure is None else f"{figure * factor:,.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures_table(kind: str, medians: dict) -> str:
    """All figures of one kind of prompt, the contenders under each other."""
    rows = [
        [
            name,
            str(clients),
            *(
                shown(got[figure], factor, digits)
                for figure, (_, factor, digits) in COLUMNS.items()
            ),
        ]
        for (name, prompt, clients), got in sorted(
            medians.items(), key=lambda item: (item[0][2], item[0][0] != OURS)
        )
        if prompt == kind
    ]
    return table(["", "clients", *(heading for heading, _, _ in COLUMNS.values())], rows)


def gain(ours: float | None, other: float | None, more_is_better: bool) -> float | None:
    """How many times better ours is: over 1 is better, under 1 worse, whatever the unit."""
    if not ours or not other:
        return None
    return ours / other if more_is_better else other / ours


def ratios_table(kind: str, medians: dict) -> str:
    """Ours beside the textbook's approach and beside the best of all others, figure by figure."""
    rows = []
    for clients in sorted({key[2] for key in medians if key[1] == kind}):
        here = {key[0]: got for key, got in medians.items() if key[1:] == (kind, clients)}
        if OURS not in here:
            continue
        ours = here.pop(OURS)
        for label, others in (("the textbook", [TEXTBOOK]), ("the best other", list(here))):
            cells = []
            for figure, more in RATIOS.items():
                gains = [
                    gain(ours[figure], here[name][figure], more) for name in others if name in here
                ]
                known = [value for value in gains if value is not None]
                cells.append(f"{min(known):.2g}×" if known else "–")
            rows.append([f"{clients} clients, to {label}", *cells])
    heads = [
        COLUMNS[figure][0].split(",")[0] + (", p95" if "p95" in figure else "")
        for figure in ("tokens_per_s", "first_median")
    ]
    return table(
        ["", *heads, "between tokens, p95", "GET /health, p95", "CPU/token", "memory"], rows
    )


def markdown(settled: dict, medians: dict) -> str:
    minutes = settled["seconds"] / 60
    text = [
        f"""# The chat server beside others

Measured {settled["when"]} on {settled["cores"]} cores ({settled["processor"]}, \
{settled["system"]}, Python {settled["python"]}), all with {settled["weights"]}: \
{settled["tokens"]} tokens an answer, \
medians over {settled["repeats"]} repeats in turn, {minutes:.0f} minutes.

Clients all begin at once. A time between tokens is one between two arrivals of new text; this \
server sends at most 25 of these a second. \
`GET /health` is asked all the while. CPU and memory are the server process's. The load runs on \
the same cores: it took what the column says, and takes {settled["load_ceiling"]:,.0f} frames/s \
when every frame is there already."""
    ]
    for kind, heading in (
        ("short", "Short prompts"),
        ("long", f"Prompts of {settled['long_prompt']:,} tokens"),
    ):
        if any(key[1] == kind for key in medians):
            text += [
                f"## {heading}",
                figures_table(kind, medians),
                "How many times better this server is (under 1: worse):",
                ratios_table(kind, medians),
            ]
    return "\n\n".join(text) + "\n"


PANELS = [
    ("tokens_per_s", "output tokens/s", 1),
    ("first_median", "time to first token, s", 1),
    ("between_p95", "between tokens (p95), ms", 1000),
    ("health_p95", "GET /health (p95), ms", 1000),
]


def chart(file: Path, settled: dict, medians: dict) -> bool:
    """Four panels over the number of clients, short prompts; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # no window: benchmarks run where there is no screen
        from matplotlib import pyplot
    except ImportError:
        return False
    names = list(dict.fromkeys(key[0] for key in medians))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(15, 3.8), layout="constrained")
    for axis, (wanted, heading, factor) in zip(axes, PANELS):
        for name in sorted(names, key=lambda name: name != OURS):
            points = sorted(
                (key[2], got[wanted] * factor)
                for key, got in medians.items()
                if key[:2] == (name, "short") and got[wanted]
            )
            if points:
                axis.plot(
                    *zip(*points),
                    marker="o",
                    label=name,
                    zorder=3 if name == OURS else 2,
                    linewidth=2.6 if name == OURS else 1.4,
                )
        counts = sorted({key[2] for key in medians})
        axis.set(title=heading, xlabel="clients", xscale="log", yscale="log")
        axis.set_xticks(counts, counts)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"{settled['cores']} cores, the same weights, {settled['tokens']} tokens "
        "an answer (logarithmic scales)",
        fontsize=11,
    )
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True


def save(folder: Path, name: str, settled: dict, medians: dict, runs: dict) -> None:
    """NAME.json, NAME.md and NAME.png; the tables are printed too."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        {
            "contender": key[0],
            "prompt": key[1],
            "clients": key[2],
            "median": got,
            "repeats": runs[key],
        }
        for key, got in medians.items()
    ]
    (folder / f"{name}.json").write_text(
        json.dumps({"settings": settled, "results": cells}, indent=1) + "\n", "utf-8"
    )
    text = markdown(settled, medians)
    (folder / f"{name}.md").write_text(text, "utf-8")
    print(text)
    if not chart(folder / f"{name}.png", settled, medians):
        print("no chart: pip install -r bench/requirements.txt adds matplotlib")
    print(f"saved in {folder}")
