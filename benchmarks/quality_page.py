"""Renders docs/quality.md from benchmarks/results/quality/ and benchmarks/published.json.

python benchmarks/quality_page.py [--check] [--keep RUN NAME]

A record is the quality.json that `onerec bench quality` leaves in its folder, the ladder.json of
`onerec bench ladder`, or what `--keep` takes from the finished run of the main job in the folder
RUN as `default/NAME.json`; a "note" in a record says what is different about this one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from onerec import environment
from onerec.evaluation.result import SYSTEMS
from onerec.experiments.compare import cell
from onerec.experiments.ladder import RUNGS
from onerec.experiments.presets import PRESETS, REFERENCE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "quality.md"
COMPARED = (REFERENCE, "OneRec, generator", "OneRec, fused", "TIGER")
PLOT = ROOT / "docs" / "images" / "ladder.svg"

INTRODUCTION = """\
# Quality

Rendered by `make docs` from the records in `benchmarks/results/quality/`; no figure is typed by
hand.

    onerec bench quality --preset cpu --data FOLDER   # any log that `onerec sessions` reads

trains the generator and its baselines, measures them and prints the table; `FOLDER` decides all
sizes. The runs stay in `runs/quality-NAME-PRESET` (`--out`): a finished one is not trained again,
a stopped one goes on from its checkpoint. `--jobs 2` trains two at a time, which uses two cores
better than two threads of one training do; `--systems`, `--seeds`, `--epochs` and `--max_users`
make it smaller. `--preset gpu` holds the sizes for one H200, `--preset tokenizers` one generator on
the ids of four tokenizers.

    onerec bench ladder   # a simulated world: sizes, experts, sessions against next items

DEFAULT

## Protocol

- A user's last item is test, the last but one valid (or the log's own split). The whole catalogue
  is ranked, and a hit is the item itself, with expected credit where items share an id.
- *Masked*: the user's history cannot be recommended; *unmasked*: it can. Nobody repeats an item
  in the Amazon logs, so masking alone is worth a tenth of Recall@10: compare like with like.
- The checkpoint is chosen by NDCG@10 on up to 3000 users of valid, and the weight of the fusion
  by NDCG@10 on valid; test is measured once a seed.
- A value is the mean over seeds. [low, high] resamples users (1000 times, 95 %), each with the
  mean of its seeds; sd is the spread of the seeds. The difference from SASRec is paired: the same
  users in both.
- MFLOP a target: what forward and backward of one training target cost, counted on a batch.
- Beams shorter than ten leave misses. Targets that training never shows stay in.

## The rows

- **SASRec** (arXiv 1808.09781): the softmax over the whole catalogue at every position, or the
  paper's binary loss with one negative.
- **OneRec**: causal encoder over items, whose cross-attention is cut off at each prefix, so that
  one pass supervises all of them; a decoder that writes balanced, unique semantic ids with a
  softmax over the trie's legal codes; the items' own embeddings and vectors at the input; a
  sampled softmax over items as auxiliary loss. *Generator* is the beam alone, *dense head* the
  auxiliary softmax alone, *fused* ranks what either finds by (1 - a) log p_generator + a log
  p_dense (`Recommender.rank(dense_weight=a)`). It reads the items' vectors too, which SASRec does
  not: the difference between the two is that of the recipes, not of their decoders alone.
- **OneRec, bidirectional**: the same recipe with the encoder of arXiv 2502.18965, which serves one
  prefix an encoding: several times the work an epoch, and several times the steps.
- **TIGER** (arXiv 2305.05065): `RQVAE` ids, 3 codes of 256 and a collision digit, and next-item
  generation by an encoder-decoder over codes (`OneRecConfig.preset("tiger")`, smaller in preset
  cpu): bidirectional, dense, ReLU, without the items' own embeddings. It differs from the paper's
  T5 in learned positions instead of relative biases, a code table for each level, no user token,
  and a beam held to the trie.
"""


DEFAULT = """\
## The default command

    onerec run --data FOLDER --out DIR

and no other flag, one training each: the rule, the split, the ids and the steps follow from the
log. *model* is the ranking that is recommended, *generator* the beam of the same network without
dense head and counts. The baselines see what training sees, and valid chose their options.
Intervals resample users; the lead is paired. The history can be recommended where the log's targets
repeat it. *At a later time*: without the targets that bear the time of the item before them, whose
order is only that of the log's rows (empty: no target bears it, or the record is older).

"""


def keep(run: Path, name: str) -> None:
    """Takes the figures of a finished run of the main job into a record."""
    stages = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob("*/stage.json"))
    }
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    protocol = evaluation["protocol"]
    split, history = protocol["splits"][-1], protocol["served"]
    rows: dict[str, dict[str, Any]] = {}
    for one in evaluation["measures"] + evaluation["differences"]:
        system = one["system"].removeprefix("model - ")
        if (
            one["split"] != split
            or one["history"] != history
            or system not in SYSTEMS
            or system == "random"
        ):
            continue
        key = one["metric"]
        if key in ("recall@10", "ndcg@10") or key.startswith("recall@10["):
            lead = " - " in one["system"]
            value = [one["value"], one["low"], one["high"]]
            rows.setdefault(system, {})[f"lead {key}" if lead else key] = value
    record = {
        "data": name,
        "sizes": protocol["split_sizes"][split] | {"items": protocol["items"]},
        "rule": stages["sessions"]["summary"]["rule"],
        "split": split,
        "history": history,
        "steps": stages["pretrain"]["summary"]["steps"],
        "minutes": {stage: round(made["seconds"] / 60, 1) for stage, made in stages.items()},
        "rows": rows,
        "environment": environment.published(),
    }
    path = RESULTS / "default" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def default() -> str:
    """The section on the default command; empty without a record."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("default/*.json"))]
    if not records:
        return ""
    text = DEFAULT
    for record in records:
        rows, sizes = record["rows"], record["sizes"]
        text += (
            f"### {record['data']}\n\n{sizes['items']:,} items; {sizes['sessions']:,} sessions of "
            f"{record['split']}, rule {record['rule']}, history {record['history']}; "
            f"{record['steps']:,} steps, {sum(record['minutes'].values()):.0f} minutes"
            f"{record.get('note', '')}.\n\n"
            "| system | R@10 | N@10 | the model's lead in R@10 | R@10 of targets seen 1-5 times "
            "| R@10 of targets at a later time |\n|---|---:|---:|---:|---:|---:|\n"
        )
        best = max(rows.values(), key=lambda row: row["recall@10"][0])
        for system, row in sorted(rows.items(), key=lambda pair: -pair[1]["recall@10"][0]):
            value, low, high = row["recall@10"]
            cell_text = f"{value:.4f} [{low:.4f}, {high:.4f}]"
            cell_text = f"**{cell_text}**" if row is best else cell_text
            lead = row.get("lead recall@10")
            told = "" if lead is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*lead)
            parts = [row.get(f"recall@10[{part}]") for part in ("1-5", "later")]
            parts_told = " | ".join("" if part is None else f"{part[0]:.4f}" for part in parts)
            cells = (system, cell_text, f"{row['ndcg@10'][0]:.4f}", told, parts_told)
            text += f"| {' | '.join(cells)} |\n"
        text += "\n"
    return text


def table(record: dict[str, Any]) -> list[str]:
    """The main table of one record: valid and test side by side, masked and unmasked."""
    cases = [
        (history, metric, split)
        for history in ("masked", "unmasked")
        for metric in ("recall@10", "ndcg@10")
        for split in ("valid", "test")
    ]
    short = {"recall@10": "R@10", "ndcg@10": "N@10"}
    heads = [
        *(f"{short[metric]} {history}, {split}" for history, metric, split in cases),
        f"R@10 masked, test, minus {record['reference']}",
    ]
    lines = [f"| row | seeds | {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) + 1)}"]
    for row in record["rows"]:
        cells = [row["row"], str(len(row["seeds"]))]
        for history, metric, split in cases:
            found = cell(row, split, history, metric)
            text = f"{found['value']:.4f}"
            if metric == "recall@10" and split == "test":
                text += f" [{found['low']:.4f}, {found['high']:.4f}]"
                text += "" if found["sd"] is None else f", sd {found['sd']:.4f}"
            cells.append(text)
        against = cell(row, "test", "masked", "recall@10")["difference"]
        cells.append("" if against is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*against))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def costs(record: dict[str, Any]) -> list[str]:
    """What each row costs, and how it came about, with the seeds in order."""
    lines = [
        "| row | parameters | MFLOP a target | minutes of training | epochs | epoch chosen | a |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in record["rows"]:
        facts = row["facts"]
        if "epochs" not in facts[0]:
            continue
        chosen = ", ".join(f"{f['selected_epoch']:.0f}" for f in facts)
        cells = [
            row["row"],
            f"{row['cost']['parameters'] / 1e6:.2f} M",
            f"{row['cost']['flops'] / 1e6:.1f}",
            f"{row['cost']['train_seconds'] / 60:.1f}",
            f"{facts[0]['epochs']:g}",
            chosen,
            ", ".join(f"{f['dense_weight']:g}" for f in facts if "dense_weight" in f),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rare(record: dict[str, Any]) -> list[str]:
    """Recall of targets by how often training shows them."""
    names = list(record["rows"][0]["rare"])
    sizes = [record["rows"][0]["rare"][name]["sessions"] for name in names]
    head = [f"{name} ({size:,})" for name, size in zip(names, sizes, strict=True)]
    lines = [f"| row | {' | '.join(head)} |", f"|---|{'---:|' * len(names)}"]
    for row in record["rows"]:
        values = [f"{row['rare'][name]['recall@10']:.4f}" for name in names]
        lines.append(f"| {row['row']} | {' | '.join(values)} |")
    return lines


def tokenizers(record: dict[str, Any]) -> list[str]:
    """What each tokenizer made of the items, and what the same generator reaches on it."""
    lines = [
        "| ids | codes an item | squared error | entropy of each level, bits | unique share "
        "| lowest utilisation | R@10 masked, valid | test |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    levels = record["options"]["levels"]
    for row in record["rows"]:
        ids = row["facts"][0].get("ids")
        if ids is None or not row["row"].endswith(("generator", "TIGER", "ids")):
            continue
        test = cell(row, "test", "masked", "recall@10")
        cells = [
            f"{row['row']} ({ids['tokenizer']})",
            str(len(ids["entropy"])),
            f"{ids['mse']:.4f}",
            ", ".join(f"{bits:.2f}" for bits in ids["entropy"]),
            f"{ids['unique_share']:.4f}",
            f"{min(ids['utilisation'][:levels]):.2f}",
            f"{cell(row, 'valid', 'masked', 'recall@10')['value']:.4f}",
            "{value:.4f} [{low:.4f}, {high:.4f}]".format(**test),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def beside(record: dict[str, Any], published: dict[str, Any]) -> list[str]:
    """Each published number, and ours under the protocol it was made with."""
    ours = [r for r in record["rows"] if r["row"] in COMPARED]

    def value(row: dict[str, Any], masked: str) -> str:
        cases = {"yes": ["masked"], "no": ["unmasked"]}.get(masked, ["masked", "unmasked"])
        return " / ".join(f"{cell(row, 'test', c, 'recall@10')['value']:.4f}" for c in cases)

    return [
        f"\nPublished numbers on this data set. {published['about']} The last columns are ours, "
        "masked or not as the source has it; masked / unmasked where it does not say.\n",
        "| model | source | masked | hit on | chosen on | N@10 | R@10 "
        f"| {' | '.join(r['row'] for r in ours)} |",
        f"|---|---|---|---|---|---:|---:|{'---:|' * len(ours)}",
        *(
            f"| {r['model']} | {r['source']} | {r['masked']} | {r['hit']} | {r['chosen']} "
            f"| {r['ndcg@10']:.4f} | {r['recall@10']:.4f} "
            f"| {' | '.join(value(row, r['masked']) for row in ours)} |"
            for r in published["rows"]
        ),
    ]


def section(record: dict[str, Any], published: dict[str, Any]) -> str:
    """The part of the page about one record."""
    data, environment = record["data"], record["environment"]
    cpu = environment["cpu"]
    lines = [
        f"\n## {data['name']}, preset {record['preset']}\n",
        f"{data['users']:,} users, {data['items']:,} items, {data['train_sessions']:,} training "
        f"targets; measured sessions: {data['sessions']['valid']:,} valid, "
        f"{data['sessions']['test']:,} test. Item vectors: {data['vectors']}. "
        f"onerec {environment['onerec']}, {record['datetime'][:10]}, torch "
        f"{environment['packages']['torch']}, {cpu['name'].strip()}, "
        f"{environment['torch']['threads']} thread(s); minutes are wall time of training.\n",
        *([record["note"] + "\n"] if "note" in record else []),
    ]
    if record["preset"] != "tokenizers":
        lines += [
            *table(record),
            "\nRecall@10 on test, masked, by the target's number of occurrences in training "
            "(number of sessions):\n",
            *rare(record),
        ]
    lines += [
        "\nSemantic ids, of seed 0 (a collision digit counts as a code):\n",
        *tokenizers(record),
        "\nCost, and the epoch and the weight a that valid chose, by seed:\n",
        *costs(record),
    ]
    if record["preset"] != "tokenizers" and data["name"] in published:
        lines += beside(record, published[data["name"]])
    return "\n".join(lines) + "\n"


def ladder(record: dict[str, Any]) -> str:
    """The part of the page about the scale ladder."""
    data = record["data"]
    lines = [
        "\n## Scale ladder, simulated world\n",
        f"{data['users']:,} users, {data['items']:,} items, {data['train_sessions']:,} training "
        f"sessions, {data['test_sessions']:,} test sessions; {record['options']['epochs']:g} "
        f"epochs, {record['options']['seeds']} seed(s), {record['datetime'][:10]}. A generator "
        "gives five "
        "items (of a next-item network the five best of its ranking), and the value is the world's "
        "true expectation of the seconds watched. Experts are eight of half the dense width, two "
        "for each token: as many weights meet a token as in the dense network of that size. "
        "Next-item networks are trained on as many target items as those that write sessions. "
        "MFLOP are of training, a target item. [low, high] resamples users.\n",
        *([record["note"] + "\n"] if "note" in record else []),
        "| size | layers | target | parameters | active | MFLOP an item | valid loss | seconds "
        "a session |",
        "|---|---|---|---:|---:|---:|---:|---|",
        *(
            f"| {r['size']} | {'experts' if r['experts'] else 'dense'} | {r['target']} "
            f"| {r['parameters']:,.0f} | {r['active_parameters']:,.0f} | {r['flops'] / 1e6:.2f} "
            f"| {r['valid_loss']:.3f} " + "| {:.1f} [{:.1f}, {:.1f}] |".format(*r["watch_seconds"])
            for r in record["rows"]
        ),
        "\n![Seconds watched against parameters and work](images/ladder.svg)\n",
        "Paired differences in seconds a session, the same users in both:\n",
        "| claim | first | second | first minus second |",
        "|---|---|---|---|",
        *(
            f"| {CLAIMS[p['claim']]} | {p['first']} | {p['second']} "
            + "| {:+.1f} [{:+.1f}, {:+.1f}] |".format(*p["difference"])
            for p in sorted(record["pairs"], key=lambda p: p["claim"])
        ),
        "\n" + verdict(record["pairs"]),
    ]
    return "\n".join(lines) + "\n"


CLAIMS = {
    "larger": "a larger network is better",
    "experts": "experts are better at equal active weights",
    "sessions": "sessions are better than next items",
}


def verdict(pairs: list[dict[str, Any]]) -> str:
    """What the differences say of each claim, in one sentence."""
    said = []
    for claim, text in CLAIMS.items():
        ends = [p["difference"] for p in pairs if p["claim"] == claim]
        up, down = sum(low > 0 for _, low, _ in ends), sum(high < 0 for _, _, high in ends)
        said.append(f"{text}: {up} of {len(ends)} pairs for it and {down} against it")
    return f"Beyond the interval — {'; '.join(said)}."


def draw(record: dict[str, Any], path: Path) -> None:
    """The ladder as two panels: against parameters and against the work of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "ladder"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, cost, label in zip(
        axes,
        ("parameters", "flops"),
        ("parameters", "FLOP of training, a target item"),
        strict=True,
    ):
        for target, color in (("session", "tab:blue"), ("next", "tab:orange")):
            for experts, style in ((False, "-o"), (True, "--s")):
                rows = [
                    r
                    for r in record["rows"]
                    if r["target"] == target and bool(r["experts"]) == experts
                ]
                if not rows:
                    continue
                value, low, high = np.array([r["watch_seconds"] for r in rows]).T
                axis.errorbar(
                    [r[cost] for r in rows],
                    value,
                    [value - low, high - value],
                    fmt=style,
                    color=color,
                    capsize=2,
                    label=f"{target}, {'experts' if experts else 'dense'}",
                )
        axis.set(xscale="log", xlabel=label)
    axes[0].set_ylabel("true seconds a session")
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def page() -> str:
    """The whole page."""
    published = json.loads((ROOT / "benchmarks" / "published.json").read_text())
    records = read()
    climbed = [record for record in records if record["preset"] == "ladder"]
    records = [record for record in records if record["preset"] != "ladder"]
    text = INTRODUCTION.replace("DEFAULT\n\n", default()) + "\n## Not yet run\n\n"
    for preset, systems in PRESETS.items():
        run = {row["system"] for r in records if r["preset"] == preset for row in r["rows"]}
        if missing := [system.name for system in systems if system.name not in run]:
            text += f"- preset {preset}: {', '.join(missing)}\n"
    found = {(r["size"], bool(r["experts"]), r["target"]) for c in climbed for r in c["rows"]}
    if left := [r.name for r in RUNGS if (r.size, bool(r.experts), r.target) not in found]:
        text += f"- ladder: {', '.join(left)}\n"
    text += "".join(section(record, published) for record in records)
    return text + "".join(map(ladder, climbed))


def read() -> list[dict[str, Any]]:
    """All records."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--keep", nargs=2, metavar=("RUN", "NAME"), help="make a default record")
    options = parser.parse_args()
    if options.keep:
        keep(Path(options.keep[0]), options.keep[1])
    if not options.check:
        PAGE.write_text(page())
        for record in read():
            if record["preset"] == "ladder":
                draw(record, PLOT)
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what the records give: run `make docs`")


if __name__ == "__main__":
    main()
