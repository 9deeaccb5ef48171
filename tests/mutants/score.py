"""What became of mutants: python3 tests/mutants/score.py RESULTS... [--missed]

Those that equivalent.toml explains are counted apart. Exits with 1 if a mutant of the mathematics was missed or not tried
and is not explained, or an explanation is of none."""

import collections
import json
import pathlib
import sys
import tomllib

STRICT = ("src/wora", "src/operators")

paths = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
latest = {}
for path in paths:
    with open(path) as file:
        latest.update((line["name"], line) for line in map(json.loads, file))
equivalent = tomllib.loads((pathlib.Path(__file__).parent / "equivalent.toml").read_text())
explained = collections.Counter(
    (entry["file"], mutant) for entry in equivalent["mutants"] for mutant in entry["mutants"]
)
by_hand = {(entry["file"], mutant): "by_hand" in entry for entry in equivalent["mutants"] for mutant in entry["mutants"]}
places = collections.defaultdict(collections.Counter)
missed = []
for line in latest.values():
    # FILE:LINE:COLUMN: what is replaced. Lines move.
    file, _, _, mutant = line["name"].split(":", 3)
    outcome = line["outcome"]
    if outcome in ("missed", "unplanted") and explained[file, mutant.strip()] > 0:
        explained[file, mutant.strip()] -= 1
        outcome = "killed" if by_hand[file, mutant.strip()] else "equivalent"
    elif outcome in ("missed", "unplanted"):
        missed.append((outcome, line["name"], line.get("by", "")))
    places[file.rsplit("/", 1)[0]][outcome] += 1
outcomes = ["killed", "missed", "equivalent", "unviable", "unplanted"]
print(f"{'':24}" + "".join(f"{outcome:>11}" for outcome in outcomes) + f"{'score':>9}")
places["in all"] = sum(places.values(), collections.Counter())
for folder, counts in sorted(places.items(), key=lambda place: (place[0] == "in all", place[0])):
    # Those that nothing can kill are against nobody, and for nobody.
    tried = counts["killed"] + counts["missed"]
    score = f"{100 * counts['killed'] / tried:.1f} %" if tried else "-"
    print(f"{folder:24}" + "".join(f"{counts[outcome]:11}" for outcome in outcomes) + f"{score:>9}")
if "--missed" in sys.argv:
    for line in missed:
        print(*line, sep="\t")
tried = {name.split(":", 1)[0] for name in latest}
unused = [entry for entry, count in explained.items() if count > 0 and entry[0] in tried and entry[0].startswith(STRICT)]
for file, mutant in unused:
    print(f"{file}: no mutant was missed that this explains: {mutant}")
sys.exit(bool(unused) or any(name.startswith(STRICT) for _, name, _ in missed))
