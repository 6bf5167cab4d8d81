"""Renders docs/quality.md from benchmarks/results/quality/ and benchmarks/published.json.

python benchmarks/quality_page.py [--check]

A record is the quality.json that `onerec bench quality` leaves in its folder; a "note" in it says
what is different about this one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from onerec.cli.quality import PRESETS
from onerec.evaluation.quality import cell

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality"
PAGE = ROOT / "docs" / "quality.md"

INTRODUCTION = """\
# Quality

Rendered by `make docs` from the records in `benchmarks/results/quality/`; no figure is typed by
hand.

    onerec bench quality --preset cpu --data FOLDER   # any log that `onerec sessions` reads

trains the generator and its baselines, measures them and prints the table; `FOLDER` decides all
sizes. The runs stay in `runs/quality-NAME-PRESET` (`--out`): a finished one is not trained again,
a stopped one goes on from its checkpoint. `--systems`, `--seeds`, `--epochs` and `--max_users`
make it smaller. `--preset gpu` holds the sizes for one H200.

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
- Beams shorter than ten leave misses. Targets that training never shows stay in.

## The rows

- **SASRec** (arXiv 1808.09781): the softmax over the whole catalogue at every position, or the
  paper's binary loss with one negative.
- **OneRec**: causal encoder over items, whose cross-attention is cut off at each prefix, so that
  one pass supervises all of them; a decoder that writes balanced, unique semantic ids with a
  softmax over the trie's legal codes; the items' own embeddings and vectors at the input; a
  sampled softmax over items as auxiliary loss. *Generator* is the beam alone, *dense head* the
  auxiliary softmax alone, *fused* ranks what either finds by (1 - a) log p_generator + a log
  p_dense (`Recommender.rank(dense_weight=a)`).
- **TIGER** (arXiv 2305.05065): `RQVAE` ids with a collision digit and next-item generation by the
  bidirectional `OneRec` network without experts and without the items' own embeddings. It differs
  from the paper's T5 in learned positions instead of relative biases, a head and a code table for
  each level, no user token, and a beam held to the trie.
"""


def table(record: dict[str, Any]) -> list[str]:
    """The main table of one record."""
    reference = record["reference"]
    lines = [
        "| row | seeds | valid R@10 | test R@10 masked | N@10 | R@10 unmasked | N@10 "
        f"| R@10 masked minus {reference} | parameters | minutes |",
        "|---|---:|---:|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in record["rows"]:
        main = cell(row, "test", "masked", "recall@10")
        spread = "" if main["sd"] is None else f", sd {main['sd']:.4f}"
        difference = main["difference"]
        cells = [
            row["row"],
            str(len(row["seeds"])),
            f"{cell(row, 'valid', 'masked', 'recall@10')['value']:.4f}",
            f"{main['value']:.4f} [{main['low']:.4f}, {main['high']:.4f}]{spread}",
            f"{cell(row, 'test', 'masked', 'ndcg@10')['value']:.4f}",
            f"{cell(row, 'test', 'unmasked', 'recall@10')['value']:.4f}",
            f"{cell(row, 'test', 'unmasked', 'ndcg@10')['value']:.4f}",
            "" if difference is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference),
            f"{row['cost']['parameters'] / 1e6:.2f} M",
            f"{row['cost'].get('train_seconds', 0.0) / 60:.1f}",
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
        "| R@10 masked of the generator |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for row in record["rows"]:
        ids = row["facts"][0].get("ids")
        if ids is None or not row["row"].endswith(("generator", "TIGER")):
            continue
        cells = [
            f"{row['row']} ({ids['tokenizer']})",
            str(len(ids["entropy"])),
            f"{ids['mse']:.4f}",
            ", ".join(f"{bits:.2f}" for bits in ids["entropy"]),
            f"{ids['unique_share']:.4f}",
            f"{cell(row, 'test', 'masked', 'recall@10')['value']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def settings(record: dict[str, Any]) -> list[str]:
    """How each trained row came about, in one line each."""
    lines = []
    for row in record["rows"]:
        for seed, facts in zip(row["seeds"], row["facts"], strict=True):
            if "epochs" not in facts:
                continue
            parts = [f"{facts['epochs']:g} epochs, epoch {facts['selected_epoch']:.0f} chosen"]
            if "dense_weight" in facts:
                parts.append(f"a = {facts['dense_weight']}")
            if "ids" in facts:
                ids = facts["ids"]
                used = min(ids["utilisation"])
                parts.append(
                    f"{ids['tokenizer']} ids: unique share {ids['unique_share']:.4f}, lowest "
                    f"utilisation {used:.2f}"
                )
            lines.append(f"- {row['row']}, seed {seed}: {'; '.join(parts)}")
    return lines


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
        f"{environment['torch']['threads']} thread(s); minutes are of training, on a machine that "
        "had other work too unless it says otherwise.\n",
        *([record["note"] + "\n"] if "note" in record else []),
        *table(record),
        "\nRecall@10 on test, masked, by the target's number of occurrences in training (number of "
        "sessions):\n",
        *rare(record),
        "\nSemantic ids (a collision digit counts as a code):\n",
        *tokenizers(record),
        "\nTraining:\n",
        *settings(record),
    ]
    if found := published.get(data["name"]):
        lines += [
            "\nPublished numbers on this data set. " + found["about"] + "\n",
            "| model | source | R@10 | N@10 | masked | hit on |",
            "|---|---|---:|---:|---|---|",
            *(
                f"| {r['model']} | {r['source']} | {r['recall@10']:.4f} | {r['ndcg@10']:.4f} "
                f"| {r['masked']} | {r['hit']} |"
                for r in found["rows"]
            ),
        ]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    published = json.loads((ROOT / "benchmarks" / "published.json").read_text())
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    text = INTRODUCTION + "\n## Not yet run\n\n"
    for preset, systems in PRESETS.items():
        run = {row["system"] for r in records if r["preset"] == preset for row in r["rows"]}
        if missing := [system.name for system in systems if system.name not in run]:
            text += f"- preset {preset}: {', '.join(missing)}\n"
    return text + "".join(section(record, published) for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what the records give: run `make docs`")


if __name__ == "__main__":
    main()
