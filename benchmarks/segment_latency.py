"""Measure what each method of `/v1/segment` and `/v1/detect` adds to a forward pass, on one CPU.

    OMP_NUM_THREADS=1 python benchmarks/segment_latency.py IMAGE --out RESULT.json

The time is the CPU time of this process, so other processes disturb it little. Decoding and the forward pass are not
included. The masks have the size of the image.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from PIL import Image

from service.options import parse_options
from service.vision.local import open_vision
from service.vision.tasks import task

_CASES = {
    "segment, foreground": ("segment", {"method": "foreground"}),
    "segment, cut": ("segment", {"method": "cut"}),
    "segment, cut, not refined": ("segment", {"method": "cut", "refine": False}),
    "segment, multi": ("segment", {"method": "multi"}),
    "segment, cluster, k=5": ("segment", {"method": "cluster", "k": 5}),
    "segment, cluster": ("segment", {"method": "cluster"}),
    "segment, prompt, a point": ("segment", {"method": "prompt"}),
    "detect, cut": ("detect", {"method": "cut"}),
    "detect, lost": ("detect", {"method": "lost"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--size", type=int, default=224, help="short side of the network's input in pixels")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    vision = open_vision(threads=1)
    data = arguments.image.read_bytes()
    height, width = np.asarray(Image.open(arguments.image)).shape[:2]
    times: dict[str, float] = {}
    for label, (name, options) in _CASES.items():
        chosen = dict(options, size=arguments.size)
        if options["method"] == "prompt":
            chosen["prompts"] = [{"points": [{"x": width // 2, "y": height // 2}]}]  # type: ignore[assignment]
        parsed = parse_options(task(name).options, chosen)
        analysed = vision.analyse(data, task(name).view(parsed, vision.model))
        task(name).compute(analysed, parsed, vision.model)  # imports and caches
        seconds = []
        for _ in range(arguments.repeats):
            started = time.process_time()
            task(name).compute(analysed, parsed, vision.model)
            seconds.append(time.process_time() - started)
        times[label] = round(1000 * statistics.median(seconds), 1)
        print(f"{label:30} {times[label]:7.1f} ms", flush=True)
    result = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/segment_latency.py IMAGE --size {arguments.size}",
        "model": vision.artifact.name,
        "image": [height, width],
        "patches": list(analysed.grid),
        "cpu_ms": times,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
