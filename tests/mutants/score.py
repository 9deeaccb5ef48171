"""What became of mutants: python3 tests/mutants/score.py RESULTS... [--missed]"""

import collections
import json
import sys

paths = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
latest = {}
for path in paths:
    with open(path) as file:
        latest.update((line["name"], line) for line in map(json.loads, file))
places = collections.defaultdict(collections.Counter)
for line in latest.values():
    folder = "/".join(line["name"].split(":")[0].split("/")[:-1])
    places[folder][line["outcome"]] += 1
print(f"{'':24} {'killed':>7} {'missed':>7} {'unviable':>9} {'unplanted':>10} {'score':>7}")
for folder, counts in sorted(places.items()):
    tried = counts["killed"] + counts["missed"]
    score = f"{100 * counts['killed'] / tried:.1f} %" if tried else "-"
    print(f"{folder:24} {counts['killed']:7} {counts['missed']:7} {counts['unviable']:9} {counts['unplanted']:10} {score:>7}")
if "--missed" in sys.argv:
    for line in latest.values():
        if line["outcome"] in ("missed", "unplanted"):
            print(line["outcome"], line["name"], line.get("by", ""), sep="\t")
