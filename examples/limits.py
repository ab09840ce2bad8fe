"""Frames of videos: few picks per video, no more than the annotators have hours, and some at night."""

import numpy as np

from queryselect import Client

rng = np.random.default_rng(0)
logits = rng.normal(size=(1000, 5))  # what a model says of 1000 frames
videos = [f"video {frame // 50}" for frame in range(1000)]
hours = rng.uniform(0.1, 1.0, size=1000)  # to label each frame
night = (rng.random(1000) < 0.1).astype(int)

with Client("local:") as client:  # or Client("localhost:50051")
    picks = client.select("margin", budget=12, logits=logits, groups=videos, costs=hours, cost_budget=4)
    print("please label", picks.indices.tolist(), f"in {picks.cost_spent:.1f} hours")
    print("it ended for", picks.stop_reason, *(warning.message for warning in picks.warnings))

    at_night = {"name": "night", "values": night, "limits": {1: (3, 6)}}  # at least 3, at most 6
    picks = client.select("margin", budget=12, logits=logits, groups=videos, max_per_group=2, quotas=[at_night])
    print("please label", picks.indices.tolist(), "of which at night", night[picks.indices].sum())
