"""Sentences of tokens: a model that tags words, and annotators who label whole sentences."""

import numpy as np

from queryselect import Client

SENTENCES = [
    "the cat sat on the mat while Jordan played",  # one word that the tagger can't tell, among many that it can
    "maybe Paris may march in May",  # some doubt everywhere
    "it was raining again and again",
]
DOUBTS = [  # how likely each word is to be something else than the tagger says
    [0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.49, 0.01],
    [0.20, 0.25, 0.20, 0.30, 0.10, 0.25],
    [0.01, 0.01, 0.02, 0.01, 0.01, 0.01],
]
doubts = np.concatenate(DOUBTS)
probabilities = np.stack([1 - doubts, doubts], axis=1)  # one row per word: no name, a name
sentence = np.repeat(np.arange(len(DOUBTS)), [len(each) for each in DOUBTS])  # the sentence of each word

with Client("local:") as client:  # or Client("localhost:50051")
    for how in ("MEAN", "MAX"):
        picks = client.select(
            "least_confidence", budget=1, probabilities=probabilities, item_rows=sentence, item_aggregation=how
        )
        for item, score in picks:
            print(f"{how}: please label {SENTENCES[item]!r} ({score:.2f})")
